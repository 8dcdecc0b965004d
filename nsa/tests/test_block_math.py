"""Block arithmetic: which blocks exist, what they cover, how Eq. 9 maps one kind to the other, what a step reads."""

import pytest
import torch

from nsa import NSAConfig, blocks
from nsa.config import ModelConfig
from nsa.testing import oracle

CONFIGS = [
    NSAConfig(),
    NSAConfig(l=16, d=8, l_sel=32, n_sel=4, w=64),
    NSAConfig(l=32, d=32, l_sel=32, n_sel=3, w=1),
    NSAConfig(l=64, d=16, l_sel=32, n_sel=5, w=7),
    NSAConfig(l=12, d=4, l_sel=20, n_sel=3, w=9, init_blocks=0, local_blocks=1),
    NSAConfig(l=1, d=1, l_sel=1, n_sel=6, w=3, init_blocks=2, local_blocks=3),
]
by_config = pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: f"{c.l}-{c.d}-{c.l_sel}-{c.n_sel}-{c.w}")


@by_config
def test_block_counts_are_those_found_by_listing_tokens(cfg):
    for S in range(0, 200):
        assert blocks.n_compressed(S, cfg) == len(oracle.compressed_spans(S, cfg)), S
        assert blocks.n_selection(S, cfg) == len(oracle.selection_spans(S, cfg)), S


@pytest.mark.parametrize(
    ("S", "C"), [(0, 0), (1, 0), (31, 0), (32, 1), (33, 1), (47, 1), (48, 2), (64, 3), (65536, 4095)]
)
def test_compressed_blocks_appear_when_they_are_whole(S, C):
    assert blocks.n_compressed(S, NSAConfig()) == C


def test_taps_of_the_paper_are_1_2_2_2_1_from_one_before_the_block():
    assert blocks.overlap_taps(NSAConfig(l=32, d=16, l_sel=64)) == [(-1, 1), (0, 2), (1, 2), (2, 2), (3, 1)]


@by_config
def test_taps_count_the_tokens_that_two_blocks_share(cfg):
    S = 40 * cfg.l_sel
    taps = dict(blocks.overlap_taps(cfg))
    assert list(taps) == sorted(taps)
    shared = torch.tensor(oracle.overlap(S, cfg))
    expected = torch.zeros_like(shared)
    for m in range(shared.shape[0]):
        for offset, weight in taps.items():
            j = m * cfg.l_sel // cfg.d + offset
            if 0 <= j < shared.shape[1]:
                expected[m, j] = weight
    assert torch.equal(shared, expected)


@by_config
def test_every_compressed_block_gives_all_its_weight_away(cfg):
    S = 12 * cfg.l_sel
    inside = [j for j, span in enumerate(oracle.compressed_spans(S, cfg)) if max(span) < S - cfg.l_sel]
    assert all(
        sum(row[j] for row in oracle.overlap(S, cfg)) == cfg.l // cfg.d for j in inside
    )  # the oracle itself: a block of l tokens is l/d strides
    assert sum(weight for _, weight in blocks.overlap_taps(cfg)) == cfg.l // cfg.d * (cfg.l_sel // cfg.d)


@by_config
def test_reads_is_what_a_step_sees_when_tokens_are_counted(cfg):
    for S in range(1, 12 * cfg.l_sel if cfg.l_sel < 32 else 400):
        t = S - 1
        forced = oracle.forced_blocks(t, cfg)
        others = [m for m in range(len(oracle.selection_spans(S, cfg))) if m not in forced]
        chosen = torch.tensor([forced + others[: cfg.n_sel - len(forced)]]).view(1, 1, 1, -1)
        counted = [
            oracle.seen_compressed(1, 1, 1, cfg, S),
            oracle.seen_selected(chosen, cfg, S),
            oracle.seen_window(1, 1, 1, cfg, S),
        ]
        assert tuple(blocks.reads(S, cfg)) == tuple(int(oracle.count(seen)) for seen in counted), S


def test_reads_at_64k_are_5631_tokens():
    assert tuple(blocks.reads(65536, NSAConfig())) == (4095, 1024, 512)
    assert blocks.reads(65536, NSAConfig()).total == 5631


def test_the_often_quoted_formula_is_only_an_upper_bound():
    cfg = NSAConfig()
    quoted = [blocks.n_compressed(S, cfg) + cfg.n_sel * cfg.l_sel + min(cfg.w, S) for S in range(1, 3000)]
    exact = [blocks.reads(S, cfg).total for S in range(1, 3000)]
    assert all(e <= q for e, q in zip(exact, quoted, strict=True))
    assert any(e < q for e, q in zip(exact[1100:], quoted[1100:], strict=True))


@by_config
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (0, 97), (31, 33), (64, 200)])
def test_reads_of_a_range_are_the_sum_of_its_steps(cfg, start, stop):
    steps = [blocks.reads(S, cfg) for S in range(start + 1, stop + 1)]
    assert tuple(blocks.reads_range(start, stop, cfg)) == tuple(sum(step[i] for step in steps) for i in range(3))


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"l": 32, "d": 12}, ("32", "12")),
        ({"l": 32, "d": 16, "l_sel": 40}, ("40", "16")),
        ({"n_sel": 2}, ("2", "3")),
        ({"n_sel": 4, "init_blocks": 2, "local_blocks": 3}, ("4", "5")),
        ({"local_blocks": 0}, ("local_blocks", "0")),
        ({"w": 0}, ("w", "0")),
        ({"d": 0}, ("d", "0")),
        ({"l": -32}, ("l", "-32")),
        ({"init_blocks": -1}, ("init_blocks", "-1")),
        ({"phi": "max"}, ("phi", "max", "avg", "linear", "mlp")),
        ({"gate": "relu"}, ("gate", "relu", "sigmoid", "softmax")),
    ],
)
def test_a_pattern_that_does_not_fit_together_is_refused_with_its_numbers(changes, numbers):
    with pytest.raises(ValueError, match=r"nsa\.") as error:
        NSAConfig(**changes)
    assert all(number in str(error.value) for number in numbers)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"n_heads": 8, "n_kv_groups": 3}, ("8", "3")),
        ({"d_k": 15}, ("15",)),
        ({"rope_scale": 0.0}, ("rope_scale", "0.0")),
        ({"dim": 0}, ("dim", "0")),
        ({"ffn_dim": 0}, ("ffn_dim", "0")),
        ({"ffn_dim": -1}, ("ffn_dim", "-1")),
        ({"norm_eps": -1.0}, ("norm_eps", "-1.0")),
        ({"rope_theta": float("nan")}, ("rope_theta", "nan")),
        ({"rope_scale": float("inf")}, ("rope_scale", "inf")),
    ],
)
def test_a_model_that_does_not_fit_together_is_refused_with_its_numbers(changes, numbers):
    with pytest.raises(ValueError, match=r"model\.") as error:
        ModelConfig(**changes)
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize("R", [1, 2, 3, 4, 6, 8, 16])
def test_any_number_of_heads_a_group_is_allowed(R):
    cfg = ModelConfig(n_heads=2 * R, n_kv_groups=2)
    assert cfg.n_heads // cfg.n_kv_groups == R
