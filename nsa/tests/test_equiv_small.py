"""Every op against the token-loop oracle in fp64, forward and all gradients; what the branches become when dense."""

import pytest
import torch

from nsa import blocks as arithmetic
from nsa import (
    compress,
    compressed_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
    sparse_attention,
)
from nsa.ops.combine import combine, gates
from nsa.ops.compress import make_phi
from nsa.testing import (
    allowed_mask,
    assert_same,
    assert_within_budget,
    eager,
    fixed_selection,
    inputs,
    oracle,
    pairwise,
    shapes,
)

SELECTED_BACKENDS = ("reference", "torch")


def _cases():
    """Every pair of: pattern, length, heads a group, head dims, tile, batch, layout."""
    cases = pairwise(
        length=range(8),
        R=shapes.HEADS_PER_GROUP,
        dims=shapes.HEAD_DIMS,
        pattern=tuple(shapes.PATTERNS),
        tile=("all", "last", "some"),
        B=(1, 2),
        contiguous=(True, False),
    )
    for case in cases:
        cfg = shapes.PATTERNS[case["pattern"]]
        S = shapes.lengths(cfg)[case["length"]]
        T = {"all": S, "last": 1, "some": (S + 1) // 2}[case["tile"]]
        Dk, Dv = case["dims"]
        G = 1 if case["R"] > 3 else 3 - case["B"] + 1
        label = f"{case['pattern']}-S{S}-T{T}-G{G}R{case['R']}-D{Dk},{Dv}-B{case['B']}-{case['contiguous']}"
        shape = {"G": G, "R": case["R"], "Dk": Dk, "Dv": Dv, "contiguous": case["contiguous"]}
        yield pytest.param(cfg, case["B"], T, S, shape, id=label)


every_pair = pytest.mark.parametrize(("cfg", "B", "T", "S", "shape"), list(_cases()))


def _compressed(B, S, cfg, shape, seed):
    """q, k_cmp, v_cmp with as many compressed blocks as S positions have."""
    C = len(oracle.compressed_spans(S, cfg))
    return inputs(B, S, C, **shape, seed=seed)


@every_pair
def test_compressed_attention_equals_the_loop(cfg, B, T, S, shape):
    q, k, v = _compressed(B, S, cfg, shape, seed=S)
    q = q[:, S - T :]
    assert_same(
        lambda q, k, v: compressed_attention(q, k, v, cfg, seq_len=S)[0],
        lambda q, k, v: oracle.compressed_attention(q, k, v, cfg, seq_len=S)[0],
        q,
        k,
        v,
    )
    got, want = (f(q, k, v, cfg, seq_len=S)[1] for f in (compressed_attention, oracle.compressed_attention))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_pair
def test_selection_equals_the_loop(cfg, B, T, S, shape):
    q, k, v = _compressed(B, S, cfg, shape, seed=S + 1)
    q = q[:, S - T :]
    lse = compressed_attention(q, k, v, cfg, seq_len=S)[1]
    got = select_blocks(q, k, lse, cfg, seq_len=S)
    assert torch.equal(got.cpu(), oracle.select_blocks(q, k, cfg, seq_len=S))


@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
@every_pair
def test_selected_attention_equals_the_loop(cfg, B, T, S, shape, backend):
    q, k, v = inputs(B, T, S, **shape, seed=S + 2)
    chosen = fixed_selection(B, T, k.shape[2], S, cfg, seed=S)
    assert_same(
        lambda q, k, v: selected_attention(q, k, v, chosen, cfg, backend=backend),
        lambda q, k, v: oracle.selected_attention(q, k, v, chosen, cfg),
        q,
        k,
        v,
    )


@every_pair
def test_window_equals_the_loop(cfg, B, T, S, shape):
    q, k, v = inputs(B, T, S, **shape, seed=S + 3)
    assert_same(
        lambda q, k, v: sliding_window_attention(q, k, v, cfg),
        lambda q, k, v: oracle.sliding_window_attention(q, k, v, cfg),
        q,
        k,
        v,
    )


@every_pair
def test_the_references_equal_what_is_routed_to(cfg, B, T, S, shape):
    """The readable forms of the other ops are as right as the loop that the routed ones are compared with."""
    q, k, v = _compressed(B, S, cfg, shape, seed=S)
    q = q[:, S - T :]
    routed, reference = (
        compressed_attention(q, k, v, cfg, seq_len=S, backend=backend) for backend in (None, "reference")
    )
    torch.testing.assert_close(routed, reference, rtol=1e-12, atol=1e-12)
    choices = [select_blocks(q, k, routed[1], cfg, seq_len=S, backend=backend) for backend in (None, "reference")]
    assert torch.equal(*choices)
    assert_same(
        lambda q, k, v: compressed_attention(q, k, v, cfg, seq_len=S)[0],
        lambda q, k, v: compressed_attention(q, k, v, cfg, seq_len=S, backend="reference")[0],
        q,
        k,
        v,
    )
    q, k, v = inputs(B, T, S, **shape, seed=S + 3)
    assert_same(
        lambda q, k, v: sliding_window_attention(q, k, v, cfg),
        lambda q, k, v: sliding_window_attention(q, k, v, cfg, backend="reference"),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("T", [1, 3, 64])
def test_the_window_needs_no_more_than_its_own_keys(T):
    cfg, S = shapes.PATTERNS["small"], 90
    q, k, v = inputs(2, T, S)
    kept = min(S, cfg.w + T - 1)
    whole = sliding_window_attention(q, k, v, cfg, seq_len=S)
    tail = sliding_window_attention(q, k[:, S - kept :], v[:, S - kept :], cfg, seq_len=S)
    torch.testing.assert_close(tail, whole, rtol=1e-12, atol=1e-12)


# Compression


@pytest.mark.parametrize("kind", ["avg", "linear", "mlp"])
@pytest.mark.parametrize("pattern", list(shapes.PATTERNS))
@pytest.mark.parametrize("contiguous", [True, False])
def test_compress_equals_the_loop(kind, pattern, contiguous):
    cfg = shapes.PATTERNS[pattern]
    cfg = type(cfg)(**{**cfg.__dict__, "phi": kind})
    torch.manual_seed(3)
    phi = make_phi(cfg, 12).double()
    for parameter in phi.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for S in shapes.lengths(cfg):
        x = inputs(2, 1, S, Dk=12, contiguous=contiguous).k

        got = compress(x.requires_grad_(), phi, cfg)
        want = oracle.compress(x, oracle.phi_of(phi, kind), cfg)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        if got.shape[1] == 0:
            continue
        grad = torch.randn(got.shape, dtype=torch.float64)
        leaves = [x, *phi.parameters()]
        for ours, theirs in zip(
            torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_linear_phi_starts_as_the_mean():
    cfg = type(shapes.PATTERNS["small"])(**{**shapes.PATTERNS["small"].__dict__, "phi": "linear"})
    x = inputs(1, 1, 40, Dk=6).k
    torch.testing.assert_close(
        compress(x, make_phi(cfg, 6).double(), cfg), oracle.compress(x, oracle.phi_avg(), cfg), rtol=1e-12, atol=1e-12
    )


# Gates


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_gates_and_their_sum_are_equation_5(kind):
    cfg = type(shapes.PATTERNS["small"])(gate=kind)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    outs = [torch.randn(2, 5, 4, 7, generator=generator, dtype=torch.float64) for _ in range(3)]
    got = gates(logits, cfg)
    torch.testing.assert_close(got, oracle.gates(logits, kind), rtol=1e-12, atol=1e-12)
    expected = sum(got[..., i, None] * outs[i] for i in range(3))
    torch.testing.assert_close(combine(*outs, logits, cfg), expected, rtol=1e-12, atol=1e-12)


# Autocast


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_ends_at_the_door_of_every_operation(backend):
    """A product written in fp32 is one under autocast(bf16) too, forward and backward: equal bits, equal choices."""
    cfg, S, T = shapes.PATTERNS["small"], 300, 120
    q, k, v = (x.requires_grad_() for x in inputs(1, T, S, R=3, Dk=32, Dv=32, dtype=torch.float32))
    C = arithmetic.n_compressed(S, cfg)
    logits = torch.randn(1, T, 6, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    chosen = fixed_selection(1, T, 2, S, cfg)

    def run():
        cmp, lse = compressed_attention(q, k[:, :C], v[:, :C], cfg, seq_len=S, backend=backend)
        blocks = select_blocks(q, k[:, :C], lse, cfg, seq_len=S, backend=backend)
        sel = selected_attention(q, k, v, chosen, cfg, backend=backend)
        win = sliding_window_attention(q, k, v, cfg, backend=backend)
        pair = k[:, :C], v[:, :C]
        whole = sparse_attention(q, pair, (k, v), (k, v), logits, cfg, seq_len=S, backend=backend)
        return cmp, sel, win, whole, lse, blocks

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    gradients = [torch.autograd.grad(sum(found[:4]).sum(), (q, k, v, logits)) for found in (plain, cast)]
    assert all(torch.equal(a, b) for a, b in zip((*plain, *gradients[0]), (*cast, *gradients[1]), strict=True))


# Ragged rows


@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "sliding_window_attention"])
@pytest.mark.parametrize(("lengths", "said"), [([20, 120], "seq_len = 120 need"), ([-1, 40], "-1 in row 0 is below 0")])
def test_lengths_are_looked_at_where_the_rows_are_walked(op, lengths, said):
    """Inside the operator: what a compiled caller, or one with lengths on a device, cannot know."""
    cfg = shapes.PATTERNS["small"]
    q, k, v = inputs(2, 9, 12 if op == "compressed_attention" else 20)
    chosen = fixed_selection(2, 9, 2, 20, cfg) if op == "selected_attention" else None
    rows = torch.tensor(lengths, dtype=torch.int32)
    with pytest.raises(ValueError, match=said):
        getattr(torch.ops.nsa, op)(q, k, v, chosen, list(cfg.pattern), 0, rows, False, None)


def test_a_compiled_call_refuses_a_negative_length():
    cfg = shapes.PATTERNS["small"]
    q, k, v = inputs(2, 9, 65)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(rows):
        return sliding_window_attention(q, k, v, cfg, seq_len=rows)

    with pytest.raises(ValueError, match="-3 in row 1 is below 0"):
        run(torch.tensor([65, -3], dtype=torch.int32))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("op", ["compressed", "selected", "window"])
def test_each_row_has_its_own_length(op, T, backend):
    cfg, lengths = shapes.PATTERNS["small"], [65, 9, 33]
    S = max(lengths)
    q, k, v = inputs(3, T, S)
    for row, length in enumerate(lengths):  # what lies beyond a row's length must not matter
        k[row, length:], v[row, length:] = 1e3, -1e3
    seq_len = torch.tensor(lengths, dtype=torch.int32)
    chosen = torch.cat([fixed_selection(1, T, 2, length, cfg) for length in lengths])
    C = arithmetic.n_compressed(S, cfg)

    def run(q, k, v):
        if op == "compressed":
            return compressed_attention(q, k[:, :C], v[:, :C], cfg, seq_len=seq_len, backend=backend)[0]
        if op == "window":
            return sliding_window_attention(q, k, v, cfg, seq_len=seq_len, backend=backend)
        return selected_attention(q, k, v, chosen, cfg, seq_len=seq_len, backend=backend)

    def expected(q, k, v):
        if op == "compressed":
            return oracle.compressed_attention(q, k[:, :C], v[:, :C], cfg, seq_len=lengths)[0]
        if op == "window":
            return oracle.sliding_window_attention(q, k, v, cfg, seq_len=lengths)
        return oracle.selected_attention(q, k, v, chosen, cfg, seq_len=lengths)

    assert_same(run, expected, q, k, v)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", ["compressed", "selected", "window"])
def test_a_row_shorter_than_the_tile_has_its_queries_at_the_end(op, backend):
    """Rows of 40 and 5 positions, 9 queries each: the second row's first four are no queries at all."""
    cfg, T, lengths = shapes.PATTERNS["dense"], 9, [40, 5]
    q, k, v = inputs(2, T, 40)
    seq_len = torch.tensor(lengths, dtype=torch.int32)
    chosen = torch.full((2, T, 2, cfg.n_sel), -1, dtype=torch.int32)
    chosen[0] = fixed_selection(1, T, 2, 40, cfg)[0]
    chosen[1, 4:] = fixed_selection(1, 5, 2, 5, cfg)[0]

    def run(q, k, v, chosen, seq_len, backend):
        C = arithmetic.n_compressed(k.shape[1], cfg)
        if op == "compressed":
            out, lse = compressed_attention(q, k[:, :C], v[:, :C], cfg, seq_len=seq_len, backend=backend)
            blocks = select_blocks(q, k[:, :C], lse, cfg, seq_len=seq_len, backend=backend)
            return torch.cat([out.flatten(2), lse, blocks.flatten(2)], -1)
        if op == "window":
            return sliding_window_attention(q, k, v, cfg, seq_len=seq_len, backend=backend).flatten(2)
        return selected_attention(q, k, v, chosen, cfg, seq_len=seq_len, backend=backend).flatten(2)

    got = run(q, k, v, chosen, seq_len, backend)
    short = run(q[1:, 4:], k[1:, :5], v[1:, :5], chosen[1:, 4:], 5, None)
    torch.testing.assert_close(got[1:, 4:], short, rtol=1e-12, atol=1e-12)
    assert not got[1, :4, : 4 * 16].any()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", ["compressed", "selected", "window"])
def test_a_row_without_a_position_gives_zeros(op, backend):
    cfg, T = shapes.PATTERNS["dense"], 3
    q, k, v = inputs(2, T, 40)
    seq_len = torch.tensor([40, 0], dtype=torch.int32)
    if op == "compressed":
        out = compressed_attention(q, k, v, cfg, seq_len=seq_len, backend=backend)[0]
    elif op == "window":
        out = sliding_window_attention(q, k, v, cfg, seq_len=seq_len, backend=backend)
    else:
        chosen = torch.full((2, T, 2, cfg.n_sel), -1, dtype=torch.int32)
        chosen[0] = fixed_selection(1, T, 2, 40, cfg)[0]
        out = selected_attention(q, k, v, chosen, cfg, seq_len=seq_len, backend=backend)
    assert out[0].all()
    assert not out[1].any()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_selection_takes_each_row_at_its_own_length(backend):
    cfg, lengths, T = shapes.PATTERNS["small"], [110, 33, 9], 9
    C = arithmetic.n_compressed(max(lengths), cfg)
    q, k, v = inputs(3, T, C)
    seq_len = torch.tensor(lengths, dtype=torch.int32)
    lse = compressed_attention(q, k, v, cfg, seq_len=seq_len)[1]
    got = select_blocks(q, k, lse, cfg, seq_len=seq_len, backend=backend)
    assert torch.equal(got, oracle.select_blocks(q, k, cfg, seq_len=lengths))


# Dense limits


@pytest.mark.parametrize("T", [1, 17, 64])
@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
def test_selecting_every_block_is_full_causal_attention(backend, T):
    cfg, S = shapes.PATTERNS["small"], 64  # l' * n = S
    q, k, v = inputs(2, T, S)
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    every = fixed_selection(2, T, 2, S, cfg)
    assert_same(
        lambda q, k, v: selected_attention(q, k, v, every, cfg, backend=backend),
        lambda q, k, v: eager(q, k, v, causal),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("T", [1, 17, 20])
def test_a_window_over_everything_is_full_causal_attention(T):
    cfg, S = shapes.PATTERNS["small"], 20  # w = S
    q, k, v = inputs(2, T, S)
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    assert_same(lambda q, k, v: sliding_window_attention(q, k, v, cfg), lambda q, k, v: eager(q, k, v, causal), q, k, v)


# Low precision, on given blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 130])
@pytest.mark.parametrize("op", ["compressed", "selected-reference", "selected-torch", "window"])
def test_low_precision_stays_within_the_budget(op, dtype, T):
    cfg, S, G, R = shapes.PATTERNS["paper"], 300, 2, 3
    q, k, v = inputs(2, T, S, G=G, R=R, Dk=64, Dv=32, dtype=dtype)
    chosen = fixed_selection(2, T, G, S, cfg)
    C = arithmetic.n_compressed(S, cfg)
    if op == "compressed":
        k, v = k[:, :C], v[:, :C]
        seen = oracle.seen_compressed(T, 2, G, cfg, S)
    elif op == "window":
        seen = oracle.seen_window(T, 2, G, cfg, S)
    else:
        seen = oracle.seen_selected(chosen, cfg, S)

    def run(q, k, v):
        if op == "compressed":
            return compressed_attention(q, k, v, cfg, seq_len=S)[0]
        if op == "window":
            return sliding_window_attention(q, k, v, cfg)
        return selected_attention(q, k, v, chosen, cfg, backend=op.split("-")[1])

    assert_within_budget(run, q, k, v, allowed_mask(seen, k.shape[1], R))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lse_is_single_precision_or_better(dtype):
    cfg = shapes.PATTERNS["small"]
    q, k, v = inputs(1, 20, 4, dtype=dtype)
    out, lse = compressed_attention(q, k, v, cfg, seq_len=20)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
