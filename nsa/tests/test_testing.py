"""The helpers that judge the library can themselves say no."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nsa.testing import (
    allowed_mask,
    assert_same,
    assert_within_budget,
    check_blocks,
    eager,
    fixed_selection,
    inputs,
    oracle,
    pairwise,
    shapes,
    within_budget,
)

CFG = shapes.PATTERNS["small"]


def test_the_yardstick_is_scaled_dot_product_attention():
    q, k, v = inputs(2, 9, 30, R=3)
    mask = torch.ones(9, 30, dtype=torch.bool).tril(21)
    key, value = (x.repeat_interleave(3, 2).transpose(1, 2) for x in (k, v))
    want = F.scaled_dot_product_attention(q.transpose(1, 2), key, value, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(eager(q, k, v, mask), want, rtol=1e-12, atol=1e-12)


def test_the_yardstick_rounds_its_scores():
    q, k, v = inputs(1, 9, 30, dtype=torch.bfloat16)
    mask = torch.ones(9, 30, dtype=torch.bool)
    assert not torch.equal(eager(q, k, v, mask), eager(q.float(), k.float(), v.float(), mask).bfloat16())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x * 1.02, "rms"),
        (lambda x: x.index_fill(1, torch.tensor([3]), 0.0), "max-abs"),
        (lambda x: x * float("nan"), "non-finite"),
        (lambda x: x.float(), "float32"),
        (lambda x: x[:, :3], "expected"),
    ],
)
def test_the_budget_refuses_what_is_worse_than_the_yardstick(spoil, said):
    q, k, v = inputs(1, 20, 30, dtype=torch.bfloat16)
    mask = torch.ones(20, 30, dtype=torch.bool)
    got, exact = eager(q, k, v, mask), eager(q.double(), k.double(), v.double(), mask)
    assert within_budget(got, got, exact, "out") == []
    assert any(said in complaint for complaint in within_budget(spoil(got), got, exact, "out"))


def test_the_budget_of_fp32_refuses_what_tf32_would_give():
    q, k, v = inputs(1, 20, 30, dtype=torch.float32)
    mask = torch.ones(20, 30, dtype=torch.bool)
    exact = eager(q.double(), k.double(), v.double(), mask)
    mantissa = (q.view(torch.int32) & ~0x1FFF).view(torch.float32)  # tf32 keeps 10 bits
    assert within_budget(eager(q, k, v, mask), eager(q, k, v, mask), exact, "out") == []
    assert len(within_budget(eager(mantissa, k, v, mask), eager(q, k, v, mask), exact, "out")) == 2
    assert len(within_budget(exact.float() * (1 + 1e-5), eager(q, k, v, mask), exact, "out")) == 2


def test_the_budget_judges_every_gradient():
    q, k, v = inputs(1, 20, 30, dtype=torch.float32)
    mask = torch.ones(20, 30, dtype=torch.bool)
    assert_within_budget(lambda q, k, v: eager(q, k, v, mask), q, k, v, mask)
    with pytest.raises(AssertionError, match="dK"):
        assert_within_budget(lambda q, k, v: eager(q, k.detach() + 0.999 * (k - k.detach()), v, mask), q, k, v, mask)


def test_sameness_is_judged_for_output_and_gradients():
    x = torch.randn(5, dtype=torch.float64)
    assert_same(lambda x: x * 2, lambda x: x + x, x)
    with pytest.raises(AssertionError, match="output: off by"):
        assert_same(lambda x: x * 2 + 1e-9, lambda x: x + x, x)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_same(lambda x: x.detach() + x, lambda x: x + x, x)


def test_the_oracles_lists_become_the_same_mask():
    S, T = 40, 13
    q, k, v = inputs(2, T, S, R=3)
    chosen = fixed_selection(2, T, 2, S, CFG)
    mask = allowed_mask(oracle.seen_selected(chosen, CFG, S), S, 3)
    want = oracle.selected_attention(q, k, v, chosen, CFG)
    torch.testing.assert_close(eager(q, k, v, mask), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", list(shapes.PATTERNS))
def test_given_selections_are_legal_and_differ_with_the_seed(pattern):
    cfg = shapes.PATTERNS[pattern]
    lists = [fixed_selection(2, 50, 2, 300, cfg, seed=seed) for seed in (0, 0, 1)]
    assert check_blocks(lists[0], 300, 50, cfg) == []
    assert torch.equal(lists[0], lists[1])
    assert not torch.equal(lists[0], lists[2])


@pytest.mark.parametrize(("index", "said"), [(19, "no block beyond"), (2**31 - 1, "no block beyond"), (-7, "are -1")])
def test_an_index_out_of_range_is_reported_with_its_place(index, said):
    """A kernel masks it like -1; here is where it is seen. 300 tokens are 19 blocks."""
    blocks = fixed_selection(2, 50, 2, 300, CFG)
    blocks[1, 30, 0, 3] = index
    complaints = check_blocks(blocks, 300, 50, CFG)
    assert any(said in each and "b=1 t=280 g=0" in each and str(index) in each for each in complaints), complaints


def test_strided_inputs_have_the_same_values():
    plain, strided = inputs(2, 7, 9), inputs(2, 7, 9, contiguous=False)
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)
        assert b.stride(-1) == 2
        assert not b.is_contiguous()


def test_pairwise_cases_hold_every_pair():
    axes = {"a": range(8), "b": "xyzuvwk", "c": (True, False), "d": range(5)}
    cases = pairwise(**axes)
    for one, other in itertools.combinations(axes, 2):
        pairs = {(case[one], case[other]) for case in cases}
        assert pairs == set(itertools.product(axes[one], axes[other]))
    assert len(cases) <= 60  # 56 is the least, 2240 all


def test_attention_of_the_oracle_by_hand():
    """Two visible keys with scores ln 1 and ln 3: weights 1/4 and 3/4."""
    q = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).view(1, 1, 1, 4)
    scores = torch.tensor([1.0, 3.0], dtype=torch.float64).log() * 2  # times sqrt(Dk)
    k = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    k[0, :2, 0, 0] = scores
    v = torch.tensor([[8.0], [4.0], [1e9]], dtype=torch.float64).view(1, 3, 1, 1)
    out, lse = oracle.attend(q, k, v, [[[[0, 1]]]])
    assert out.item() == pytest.approx(5.0, abs=1e-12)
    assert lse.item() == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-6)
