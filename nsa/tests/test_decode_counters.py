"""Tokens read: counted where they are loaded, and equal to the formula at every context length."""

import pytest
import torch

from nsa import (
    KVCache,
    NativeSparseAttention,
    NSAConfig,
    Transformer,
    blocks,
    compressed_attention,
    selected_attention,
    sliding_window_attention,
)
from nsa.config import ModelConfig
from nsa.rope import Rope
from nsa.testing import fixed_selection, inputs, oracle, shapes

PATTERNS = [pytest.param(cfg, id=name) for name, cfg in shapes.PATTERNS.items()]
SELECTED_BACKENDS = ("reference", "torch")


def _model(cfg, layers=1, G=2):
    torch.manual_seed(0)
    model = ModelConfig(vocab_size=17, dim=8, n_layers=layers, n_heads=2 * G, n_kv_groups=G, d_k=4, d_v=4, nsa=cfg)
    return Transformer(model).double().eval()


def _ids(B, S):
    return torch.randint(17, (B, S), generator=torch.Generator().manual_seed(1))


def _cache(model, B, S):
    return KVCache(model.cfg, B, S, device="cpu", dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("cfg", PATTERNS)
def test_each_decoded_token_reads_what_the_formula_says_at_every_length(cfg):
    model, S = _model(cfg), 150
    ids, cache = _ids(1, S), _cache(model, 1, S)
    for length in range(1, S + 1):
        cache.reset_reads()
        model(ids[:, length - 1 : length], cache)
        assert tuple(cache.reads()) == tuple(blocks.reads(length, cfg)), length


@torch.no_grad()
@pytest.mark.parametrize("length", [1000, 1023, 1024, 1025, 1088, 1500])
def test_the_papers_pattern_reads_what_the_formula_says_beyond_its_budget(length):
    """32/16/64/16/512: from 1024 tokens on the selected branch stops growing."""
    cfg = NSAConfig()
    model = _model(cfg)
    ids, cache = _ids(1, length), _cache(model, 1, length)
    model(ids[:, : length - 1], cache)
    cache.reset_reads()
    model(ids[:, length - 1 :], cache)
    assert tuple(cache.reads()) == tuple(blocks.reads(length, cfg))


@torch.no_grad()
@pytest.mark.parametrize("tiles", [[130], [64, 66], [3, 60, 1, 1, 65]], ids=lambda tiles: f"{len(tiles)}tiles")
@pytest.mark.parametrize("cfg", PATTERNS)
def test_a_prefill_reads_the_sum_of_its_steps_in_any_tiling(cfg, tiles):
    model = _model(cfg)
    ids, cache, start = _ids(2, 130), _cache(model, 2, 130), 0
    for tile in tiles:
        model(ids[:, start : start + tile], cache)
        start += tile
        assert tuple(cache.reads()) == tuple(blocks.reads_range(0, start, cfg))


@torch.no_grad()
def test_every_layer_row_and_group_counts_for_itself():
    cfg = shapes.PATTERNS["small"]
    model = _model(cfg, layers=3, G=2)
    cache = _cache(model, 2, 77)
    model(_ids(2, 77), cache)
    expected = torch.tensor(tuple(blocks.reads_range(0, 77, cfg))).view(3, 1, 1).expand(3, 2, 2)
    for layer in cache.layers:
        assert torch.equal(layer.reads, expected)
    cache.layers[1].reads[2, 1, 0] += 1
    with pytest.raises(RuntimeError, match="different"):
        cache.reads()


@torch.no_grad()
def test_a_rewound_cache_counts_the_second_reading_too():
    cfg = shapes.PATTERNS["small"]
    model = _model(cfg)
    ids, cache = _ids(1, 60), _cache(model, 1, 60)
    model(ids[:, :59], cache)
    cache.reset_reads()
    for _ in range(3):
        model(ids[:, 59:], cache)
        cache.rewind(1)
    assert tuple(cache.reads()) == tuple(3 * n for n in blocks.reads(60, cfg))


# The counters follow what the ops were handed, not what they should have been handed.


@pytest.mark.parametrize("backend", SELECTED_BACKENDS)
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("cfg", PATTERNS)
def test_selected_reads_are_the_tokens_of_the_list_that_was_given(cfg, T, backend):
    S = 111
    q, k, v = inputs(2, T, S)
    chosen = fixed_selection(2, T, 2, S, cfg)
    listed = [chosen, chosen.clone(), chosen.clone(), torch.full_like(chosen, -1)]
    listed[1][:, :, :, 0] = -1
    listed[2][1, T // 2, 0] = -1
    counts = []
    for blocks_given in listed:
        reads = torch.full((2, 2), 5, dtype=torch.int64)
        selected_attention(q, k, v, blocks_given, cfg, reads=reads, backend=backend)
        assert torch.equal(reads - 5, oracle.count(oracle.seen_selected(blocks_given, cfg, S)))
        counts.append(int(reads.sum()))
    assert counts[0] > counts[1] > counts[3] == 20
    assert counts[0] > counts[2] > counts[3]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("T", [1, 40, 111])
@pytest.mark.parametrize("cfg", PATTERNS)
def test_compressed_reads_are_the_blocks_that_each_query_sees(cfg, T, backend):
    S = 111
    q, k, v = inputs(2, T, len(oracle.compressed_spans(S, cfg)), G=3)
    reads = torch.zeros(2, 3, dtype=torch.int64)
    compressed_attention(q, k, v, cfg, seq_len=S, reads=reads, backend=backend)
    assert torch.equal(reads, oracle.count(oracle.seen_compressed(T, 2, 3, cfg, S)))


def test_compressed_reads_of_a_long_input_are_counted_where_residues_are_problems_of_their_own():
    cfg, S = shapes.PATTERNS["small"], 1003
    q, k, v = inputs(1, S, len(oracle.compressed_spans(S, cfg)), dtype=torch.float32)
    reads = torch.zeros(1, 2, dtype=torch.int64)
    compressed_attention(q, k, v, cfg, seq_len=S, reads=reads)
    assert reads.tolist() == [[blocks.reads_range(0, S, cfg).cmp] * 2]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("T", [1, 40, 111])
@pytest.mark.parametrize("cfg", PATTERNS)
def test_window_reads_are_the_tokens_in_it(cfg, T, backend):
    S = 111
    q, k, v = inputs(2, T, S)
    for kept in (S, min(S, cfg.w + T - 1)):
        reads = torch.zeros(2, 2, dtype=torch.int64)
        sliding_window_attention(q, k[:, S - kept :], v[:, S - kept :], cfg, seq_len=S, reads=reads, backend=backend)
        assert torch.equal(reads, oracle.count(oracle.seen_window(T, 2, 2, cfg, S)))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("T", [1, 9])
def test_ragged_rows_count_their_own_reads(T, backend):
    cfg, lengths = shapes.PATTERNS["small"], [65, 9, 33]
    S = max(lengths)
    q, k, v = inputs(3, T, S)
    seq_len = torch.tensor(lengths, dtype=torch.int32)
    chosen = torch.cat([fixed_selection(1, T, 2, length, cfg) for length in lengths])
    C = len(oracle.compressed_spans(S, cfg))
    reads = torch.zeros(3, 3, 2, dtype=torch.int64)
    compressed_attention(q, k[:, :C], v[:, :C], cfg, seq_len=seq_len, reads=reads[0], backend=backend)
    selected_attention(q, k, v, chosen, cfg, seq_len=seq_len, reads=reads[1], backend=backend)
    sliding_window_attention(q, k, v, cfg, seq_len=seq_len, reads=reads[2], backend=backend)
    assert torch.equal(reads[0], oracle.count(oracle.seen_compressed(T, 3, 2, cfg, lengths)))
    assert torch.equal(reads[1], oracle.count(oracle.seen_selected(chosen, cfg, lengths)))
    assert torch.equal(reads[2], oracle.count(oracle.seen_window(T, 3, 2, cfg, lengths)))


def test_a_layer_whose_choice_is_cut_short_reads_less_than_the_formula(monkeypatch):
    """The counters of the cache come from the ops' inputs: hand them fewer blocks and they drop below the formula."""
    from nsa.ops import selection

    cfg = shapes.PATTERNS["small"]
    layer = NativeSparseAttention(ModelConfig(dim=8, n_heads=4, n_kv_groups=2, d_k=4, d_v=4, nsa=cfg)).double()
    whole = selection.choose

    def without_the_first(*args, **kwargs):
        chosen = whole(*args, **kwargs)
        chosen[..., 0] = -1
        return chosen

    monkeypatch.setattr(selection, "choose", without_the_first)
    cache = KVCache(layer.cfg, 1, 90, device="cpu", dtype=torch.float64)
    x = torch.randn(1, 90, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        layer(x[:, :89], Rope.of(layer.cfg, 0, 89, "cpu", torch.float64), cache.layers[0])
        cache.reset_reads()
        layer(x[:, 89:], Rope.of(layer.cfg, 89, 1, "cpu", torch.float64), cache.layers[0])
    expected = blocks.reads(90, cfg)
    assert cache.reads() == expected._replace(sel=expected.sel - cfg.l_sel)
