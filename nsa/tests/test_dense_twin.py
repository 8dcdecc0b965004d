"""The dense twin: the same model with causal softmax attention, trained, prefilled in tiles, decoded, checkpointed."""

import dataclasses

import pytest
import torch

from nsa import KVCache, ModelConfig, NSAConfig, Transformer
from nsa.attention import DenseAttention, causal_attention
from nsa.rope import Rope
from nsa.testing import oracle


def _config(**changes):
    known = {"vocab_size": 31, "dim": 16, "n_layers": 2, "n_heads": 6, "n_kv_groups": 2, "d_k": 8, "d_v": 4}
    return ModelConfig(**known | {"attention": "dense"} | changes)


def _model(**changes):
    torch.manual_seed(2)
    model = Transformer(_config(**changes)).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def _ids(B, S, seed=0):
    return torch.randint(31, (B, S), generator=torch.Generator().manual_seed(seed))


def _by_loop(q, k, v):
    """q [B,T,H,Dk], the last T of S positions, a query and a head at a time."""
    T, S, per_group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    rows = []
    for i in range(T):
        seen = S - T + i + 1
        heads = []
        for h in range(q.shape[2]):
            keys, values = (x[:, :seen, h // per_group] for x in (k, v))
            p = (torch.einsum("bd,bsd->bs", q[:, i, h], keys) * q.shape[-1] ** -0.5).softmax(-1)
            heads.append(torch.einsum("bs,bsd->bd", p, values))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 20), (5, 20), (19, 20), (20, 20)])
@pytest.mark.parametrize(("H", "G"), [(6, 2), (4, 4), (3, 1)])
def test_a_query_sees_its_own_position_and_all_before(T, S, H, G):
    """Aligned with the last key: torch's `is_causal` aligns with the first."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(2, n, heads, D, generator=generator, dtype=torch.float64)
        for n, heads, D in ((T, H, 8), (S, G, 8), (S, G, 4))
    )
    torch.testing.assert_close(causal_attention(q, k, v), _by_loop(q, k, v), rtol=1e-12, atol=1e-12)


def test_the_layer_projects_rotates_attends_and_projects():
    cfg = _config(rope_scale=2.0)
    torch.manual_seed(1)
    layer = DenseAttention(cfg).double()
    x = torch.randn(2, 33, 16, dtype=torch.float64, requires_grad=True)
    q, k, v = (p(x).unflatten(-1, (-1, D)) for p, D in ((layer.q_proj, 8), (layer.k_proj, 8), (layer.v_proj, 4)))
    q, k = (oracle.rotate(y, range(33), cfg.rope_theta, cfg.rope_scale) for y in (q, k))
    want = layer.o_proj(_by_loop(q, k, v).flatten(2))
    got = layer(x, Rope.of(cfg, 0, 33, "cpu", torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves, grad = [x, *layer.parameters()], torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_training_equals_tiles_equals_decode():
    model, ids = _model(), _ids(2, 80)
    want = model(ids)
    for tiles in ([1] * 80, [77, 3], [16] * 5, [74, 1, 5]):
        cache, start, outs = KVCache(model.cfg, 2, 80, device="cpu", dtype=torch.float64), 0, []
        for tile in tiles:
            outs.append(model(ids[:, start : start + tile], cache))
            start += tile
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-12, atol=1e-12)
        assert cache.length == 80


@torch.no_grad()
def test_generation_is_the_argmax_of_the_training_forward_at_every_step():
    model, ids = _model(), _ids(2, 13)
    want = ids
    for _ in range(10):
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 10), want)


@torch.no_grad()
def test_a_rewound_cache_decodes_the_same_token_again_and_refuses_what_it_cannot():
    model, ids = _model(), _ids(1, 30)
    cache = KVCache(model.cfg, 1, 30, device="cpu", dtype=torch.float64)
    model(ids[:, :29], cache)
    first = model(ids[:, 29:], cache)
    cache.rewind(1)
    assert torch.equal(model(ids[:, 29:], cache), first)
    with pytest.raises(ValueError, match="max_len = 30"):
        model(ids[:, :1], cache)
    with pytest.raises(ValueError, match="cannot rewind 31 of 30"):
        cache.rewind(31)
    for ask in (cache.reads, cache.reset_reads):
        with pytest.raises(ValueError, match="a dense step at S positions reads all S"):
            ask()


def test_checkpointing_changes_no_gradient_and_every_parameter_learns():
    model, ids = _model(), _ids(2, 40)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model.loss(ids, ids.roll(1, 1)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.any() for g in gradients[0])


def test_it_has_neither_compression_nor_gates_and_the_shapes_of_its_twin():
    dense = dict(_model().named_parameters())
    sparse = dict(Transformer(_config(attention="nsa")).named_parameters())
    assert set(sparse) - set(dense) == {
        f"blocks.{i}.attention.gate_proj.{n}" for i in (0, 1) for n in ("weight", "bias")
    }
    differ = {name.split(".")[-2] for name in dense if dense[name].shape != sparse[name].shape}
    assert differ == {"k_proj", "v_proj"}  # one projection instead of one a branch


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("l", 64),
        ("d", 8),
        ("l_sel", 32),
        ("n_sel", 8),
        ("w", 64),
        ("phi", "mlp"),
        ("gate", "softmax"),
        ("shared_kv", True),
    ],
)
def test_a_pattern_that_it_would_ignore_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"nsa\.{key} = .*: model.attention = dense has no sparse pattern"):
        _config(nsa=dataclasses.replace(NSAConfig(), **{key: value}))


def test_another_attention_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"model.attention = 'linear': choose one of nsa, dense"):
        _config(attention="linear")


def test_it_passes_through_the_cache_of_its_own_kind_only():
    model, other = _model(), _config(attention="nsa")
    with torch.no_grad(), pytest.raises(ValueError, match="another ModelConfig"):
        model(_ids(1, 3), KVCache(other, 1, 9, device="cpu", dtype=torch.float64))
