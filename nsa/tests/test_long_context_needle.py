"""A constructed needle: a token far back whose key the last query asks for; its value must come out of attention.

The weights of a real layer are set by hand, so nothing is trained and nothing is left to chance: a token carries
[query, key, value], every head reads them, and the output is the mean over heads of the gated branches. Hay is noise in
all three. The needle's key lies in the pair that rotates slowest, where distance hardly turns it. It lies outside the
window and the forced blocks, so the choice of blocks has to find it.
"""

import itertools

import pytest
import torch

from nsa import KVCache, NativeSparseAttention, NSAConfig
from nsa.config import ModelConfig
from nsa.rope import Rope

D = 64
CFG = ModelConfig(
    dim=3 * D, n_heads=4, n_kv_groups=2, d_k=D, d_v=D, rope_theta=1e6, rope_scale=8.0, nsa=NSAConfig(n_sel=8, w=512)
)
SLOW = (D // 2 - 1, D // 2 - 2)  # first halves of the two slowest pairs
ASK, ANSWER = 32.0, 24.0  # their product, over sqrt(D), is the needle's score: 96, and 3 after the mean of 32 keys
LOUD = 4.0
DEPTHS = (0.06, 0.25, 0.5, 0.61, 0.74)
OPEN, SHUT = 40.0, -1e4


def _layer(device, dtype, sel=OPEN):
    layer = NativeSparseAttention(CFG)
    eye, heads = torch.eye(3 * D).split(D), CFG.n_heads
    with torch.no_grad():
        layer.q_proj.weight.copy_(eye[0].repeat(heads, 1))
        layer.k_proj.weight.copy_(eye[1].repeat(3 * CFG.n_kv_groups, 1))
        layer.v_proj.weight.copy_(eye[2].repeat(3 * CFG.n_kv_groups, 1))
        layer.o_proj.weight.copy_(torch.cat([eye[2].T] * heads, dim=1) / heads)
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(torch.tensor([OPEN, sel, OPEN]).repeat(heads))
    return layer.to(device, dtype)


def _haystack(S):
    """x [1,S,dim] of noise; the last token asks along the slowest pair."""
    x = torch.randn(1, S, 3 * D, generator=torch.Generator().manual_seed(S))
    x[..., :D] *= 0.5
    for pair in SLOW:
        x[..., D + pair] *= 0.25
    x[..., 2 * D :] *= 0.1
    x[0, -1, SLOW[0]] = ASK
    return x


def _value(seed):
    value = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return LOUD * value / value.norm()


def _hide(x, at, value, pair=SLOW[0]):
    x = x.clone()
    x[0, at, D + pair] = ANSWER
    x[0, at, 2 * D :] = value
    return x


@torch.no_grad()
def _answer(layer, x, tile=1024):
    """Output of the last token: the haystack prefilled in tiles, the question decoded on its own."""
    S, p = x.shape[1], layer.o_proj.weight
    x = x.to(p)
    cache = KVCache(CFG, 1, S, device=p.device, dtype=p.dtype).layers[0]
    bounds = [*range(0, S - 1, tile), S - 1, S]
    for start, stop in itertools.pairwise(bounds):
        out = layer(x[:, start:stop], Rope.of(CFG, start, stop - start, p.device, p.dtype), cache)
    return out[0, -1, 2 * D :].float().cpu()


def _found(out, value):
    """1 where the output holds the whole value, 0 where it holds none of it."""
    return float(out @ value / LOUD**2)


def _place(S, depth):
    at = int(depth * S)
    assert CFG.nsa.l_sel <= at < S - CFG.nsa.w, "outside the first block, the local blocks and the window"
    return at


def _check(S, depth, device="cpu", dtype=torch.float32, tile=1024):
    x, value, at = _haystack(S), _value(1), _place(S, depth)
    layer = _layer(device, dtype)
    hidden = _hide(x, at, value)
    assert _found(_answer(layer, hidden, tile), value) == pytest.approx(1, abs=0.05)
    assert _found(_answer(layer, x, tile), value) == pytest.approx(0, abs=0.05), "there without a needle"
    deaf = _layer(device, dtype, sel=SHUT)
    assert _found(_answer(deaf, hidden, tile), value) == pytest.approx(0, abs=0.05), "there without the branch"


@pytest.mark.parametrize("depth", DEPTHS)
def test_needle_comes_out_of_2k_tokens(depth):
    _check(2048, depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_needle_comes_out_of_8k_tokens(depth):
    _check(8192, depth)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_needle_comes_out_of_64k_tokens_on_a_gpu(depth, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: 64k runs on a GPU")
    _check(65536, depth, "cuda", dtype, tile=4096)


def test_the_needle_is_found_by_the_training_forward_too():
    S, value = 2048, _value(1)
    layer, x = _layer("cpu", torch.float32), _hide(_haystack(S), _place(S, 0.4), value)
    with torch.no_grad():
        out = layer(x, Rope.of(CFG, 0, S, torch.device("cpu"), torch.float32))[0, -1, 2 * D :]
    assert _found(out, value) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("S", [2048, 8192])
def test_of_two_needles_the_one_that_is_asked_for_comes_out(S):
    """The other has another key: it is as loud, and must stay where it is."""
    wanted, other = _value(1), _value(2)
    other = LOUD * (other - wanted * (other @ wanted) / LOUD**2) / (other - wanted * (other @ wanted) / LOUD**2).norm()
    x = _hide(_hide(_haystack(S), _place(S, 0.3), wanted), _place(S, 0.5), other, pair=SLOW[1])
    out = _answer(_layer("cpu", torch.float32), x)
    assert _found(out, wanted) == pytest.approx(1, abs=0.05)
    assert _found(out, other) == pytest.approx(0, abs=0.05)


def test_a_needle_with_the_wrong_key_stays_hidden():
    S, value = 2048, _value(1)
    x = _hide(_haystack(S), _place(S, 0.5), value, pair=SLOW[1])
    assert _found(_answer(_layer("cpu", torch.float32), x), value) == pytest.approx(0, abs=0.05)
