"""The whole layer: against the token-loop oracle, and training == tiled prefill == token-by-token decode, in fp64."""

import dataclasses

import pytest
import torch

from nsa import KVCache, NativeSparseAttention
from nsa.blocks import n_compressed
from nsa.config import ModelConfig
from nsa.ops.compress import MeanPhi, compress
from nsa.rope import Rope
from nsa.testing import oracle, pairwise, shapes

PHIS = ("avg", "linear", "mlp")
GATES = ("sigmoid", "softmax")


def _layer(pattern="small", *, phi="avg", gate="sigmoid", shared_kv=False, G=2, R=2, d_k=8, d_v=6, **model):
    """A layer in fp64 whose every parameter is random, biases and phi included."""
    nsa = dataclasses.replace(shapes.PATTERNS[pattern], phi=phi, gate=gate, shared_kv=shared_kv)
    cfg = ModelConfig(dim=10, n_heads=G * R, n_kv_groups=G, d_k=d_k, d_v=d_v, nsa=nsa, **model)
    torch.manual_seed(5)
    layer = NativeSparseAttention(cfg).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


def _x(B, T, dim=10, seed=0):
    return torch.randn(B, T, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _forward(layer, x):
    return layer(x, Rope.of(layer.cfg, 0, x.shape[1], x.device, x.dtype))


def _tiled(layer, x, tiles):
    """The same tokens through the cache in tiles of the given lengths, repeated."""
    B, S, _ = x.shape
    cache = KVCache(layer.cfg, B, S, device="cpu", dtype=x.dtype).layers[0]
    outs, start, step = [], 0, 0
    with torch.no_grad():
        while start < S:
            tile = x[:, start : start + tiles[step % len(tiles)]]
            outs.append(layer(tile, Rope.of(layer.cfg, start, tile.shape[1], x.device, x.dtype), cache))
            start, step = start + tile.shape[1], step + 1
    return torch.cat(outs, 1)


def _cases():
    yield pytest.param({"R": 3, "pattern": "small", "dims": (8, 6), "B": 1, "rope_scale": 2.0}, 65, id="plain")
    cases = pairwise(
        length=range(8),
        R=shapes.HEADS_PER_GROUP,
        pattern=tuple(shapes.PATTERNS),
        phi=PHIS,
        dims=((8, 6), (32, 32), (16, 24)),
        gate=GATES,
        shared_kv=(False, True),
        rope_scale=(1.0, 8.0),
        B=(1, 2),
    )
    for case in cases:
        S = shapes.lengths(shapes.PATTERNS[case["pattern"]])[case.pop("length")]
        label = "-".join(f"{name}={value}" for name, value in case.items())
        yield pytest.param(case, S, id=f"S={S}-{label}")


@pytest.mark.parametrize(("case", "S"), list(_cases()))
def test_output_and_every_gradient_equal_the_loop(case, S):
    case = dict(case)
    B, (d_k, d_v) = case.pop("B"), case.pop("dims")
    layer = _layer(**case, d_k=d_k, d_v=d_v, G=1 if case["R"] > 4 else 2)
    x = _x(B, S).requires_grad_()
    names = ["x", *dict(layer.named_parameters())]
    leaves = [x, *layer.parameters()]
    grad = _x(B, S, seed=1)

    got, (want, _) = _forward(layer, x), oracle.layer(layer, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(got, leaves, grad)
    theirs = torch.autograd.grad(want, leaves, grad, materialize_grads=True)
    for name, a, b in zip(names, ours, theirs, strict=True):
        scale = max(1.0, float(b.abs().max()))
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12 * scale), f"{name}: off by {(a - b).abs().max():.2e}"


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("dims", [(8, 6), (16, 16)])
def test_one_product_gives_what_the_projections_give_alone(shared_kv, dims):
    layer, x = _layer(shared_kv=shared_kv, R=3, d_k=dims[0], d_v=dims[1]), _x(2, 9).requires_grad_()
    found = []
    for alone in (False, True):
        q, keys, values, logits = layer._projected(x, alone=alone)
        outs = [q, torch.cat(keys, 2), torch.cat(values, 2), logits]
        grads = [torch.cos(out.detach()) for out in outs]
        leaves = [x, *(p for n, p in layer.named_parameters() if n.split(".")[0] in ("q_proj", "k_proj", "v_proj"))]
        leaves += list(layer.gate_proj.parameters())
        found.append([*outs, *torch.autograd.grad(outs, leaves, grads)])
        if dims == (16, 16) and not alone:  # rows and their parts begin at aligned addresses
            joint = (q, *keys, *values)
            assert all(y.stride(-1) == 1 and y.stride(1) % 16 == 0 and y.storage_offset() % 16 == 0 for y in joint)
            assert len({y.untyped_storage().data_ptr() for y in joint}) == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tile", shapes.TILES)
def test_training_equals_tiled_prefill_equals_decode(phi, gate, tile):
    layer, x = _layer(phi=phi, gate=gate, R=3), _x(2, 111)
    torch.testing.assert_close(_tiled(layer, x, [tile]), _forward(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", list(shapes.PATTERNS))
@pytest.mark.parametrize("shared_kv", [False, True])
def test_any_tiling_gives_the_same(pattern, shared_kv):
    layer, x = _layer(pattern, phi="mlp", shared_kv=shared_kv, rope_scale=2.0), _x(1, 130)
    want = _forward(layer, x)
    for tiles in ([1, 5, 16], [77], [130], [3, 1, 40, 2], [64, 1, 1, 1]):
        torch.testing.assert_close(_tiled(layer, x, tiles), want, rtol=1e-12, atol=1e-12, msg=f"tiles {tiles}")


@pytest.mark.parametrize("S", shapes.LONG_LENGTHS)
def test_long_sequences_are_the_same_in_any_tiling(S):
    """Beyond the loop's reach. The training forward takes other paths here (chunks, residues) than the tiles do."""
    layer, x = _layer(phi="linear", R=3), _x(1, S)
    with torch.no_grad():
        want = _forward(layer, x)
    for tiles in ([777, 1, 300], [77]) if S < 2000 else ([1000],):
        torch.testing.assert_close(_tiled(layer, x, tiles), want, rtol=1e-12, atol=1e-12, msg=f"tiles {tiles}")
    _decode_tail_equals(layer, x, want)


def _decode_tail_equals(layer, x, want, n=3):
    S = x.shape[1]
    tiles = [S - n] + [1] * n
    torch.testing.assert_close(_tiled(layer, x, tiles)[:, -n:], want[:, -n:], rtol=1e-12, atol=1e-12)


def test_long_gradients_are_those_of_a_shorter_sequence():
    """A loss on the first tokens of a long sequence has the gradients of that sequence cut short, to which the loop
    oracle reaches; later tokens get none."""
    layer = _layer(phi="mlp")
    x = _x(1, 1000).requires_grad_()
    weight = _x(1, 150, seed=2)
    leaves = [x, *layer.parameters()]
    long = torch.autograd.grad((_forward(layer, x)[:, :150] * weight).sum(), leaves)
    short = torch.autograd.grad((oracle.layer(layer, x[:, :150])[0] * weight).sum(), leaves)
    assert not long[0][:, 150:].any()
    for a, b in zip(long, short, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("S", [1, 7])
def test_an_empty_branch_keeps_zero_gradients(phi, S):
    """Below l tokens there is no compressed block; distributed training still waits for its parameters' gradients."""
    layer = _layer(phi=phi)
    _forward(layer, _x(2, S)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.startswith("phi"):
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("S", [1, 7, 8, 15, 40])
def test_the_first_positions_have_finite_outputs_and_gradients(S, dtype):
    layer = _layer(phi="mlp").to(dtype)
    x = _x(1, S).to(dtype).requires_grad_()
    out = _forward(layer, x)
    out[:, :7].float().square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_the_scale_of_positions_is_linear_interpolation():
    """Stretching positions by s and dividing them by s again changes nothing; dividing alone does."""
    x = _x(1, 90)
    plain, scaled = (_layer(rope_scale=s) for s in (1.0, 8.0))
    assert not torch.allclose(_forward(plain, x), _forward(scaled, x), atol=1e-6)
    wide = oracle.rotate(x.view(1, 90, 1, 10), [8 * p for p in range(90)], 1e4, 8.0)
    torch.testing.assert_close(wide, oracle.rotate(x.view(1, 90, 1, 10), range(90), 1e4, 1.0), rtol=1e-12, atol=1e-12)


def test_rotation_turns_each_head_by_itself():
    """Equal weights in two heads of a group give equal outputs: no head's angles depend on its place."""
    layer = _layer(G=1, R=3)
    cfg = layer.cfg
    with torch.no_grad():
        q = layer.q_proj.weight.view(3, cfg.d_k, -1)
        q.copy_(q[:1].expand_as(q))
        gate = layer.gate_proj.weight.view(3, 3, -1)
        gate.copy_(gate[:1].expand_as(gate))
        bias = layer.gate_proj.bias.view(3, 3)
        bias.copy_(bias[:1].expand_as(bias))
    captured = []
    layer.o_proj.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    _forward(layer, _x(1, 70))
    heads = captured[0].view(1, 70, 3, cfg.d_v)
    torch.testing.assert_close(heads, heads[:, :, :1].expand_as(heads), rtol=1e-12, atol=1e-12)


def test_attention_depends_on_distances_not_on_places():
    """Rotary scores see only differences: the rotation of q at t and k at s equals that of t + 9 and s + 9."""
    layer = _layer()
    a, b = (Rope.of(layer.cfg, start, 20, "cpu", torch.float64) for start in (0, 9))
    q, k = _x(1, 20, 16).view(1, 20, 2, 8), _x(1, 20, 16, seed=1).view(1, 20, 2, 8)
    scores = [torch.einsum("bthd,bshd->bhts", rope.tokens(q), rope.tokens(k)) for rope in (a, b)]
    torch.testing.assert_close(*scores, rtol=1e-12, atol=1e-12)


def test_the_tables_of_rotation_are_exact_at_64k():
    cfg = ModelConfig(d_k=64)
    got = Rope.of(cfg, 65535, 1, "cpu", torch.float32)
    angles = torch.tensor([65535 * 10000 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    cos, sin = (table[0, 0].double() for table in (got.cos, got.sin))
    torch.testing.assert_close(cos, torch.cat([angles.cos(), angles.cos()]), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, torch.cat([-angles.sin(), angles.sin()]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("start", "T"), [(0, 1), (0, 300), (255, 2), (700, 5)])
def test_compressed_keys_are_rotated_at_their_blocks_start(start, T):
    """By the tables of the tokens that complete them."""
    cfg = _layer(rope_scale=2.0).cfg
    rope, blocks = Rope.of(cfg, start, T, "cpu", torch.float64), n_compressed(start + T, cfg.nsa)
    first = n_compressed(start, cfg.nsa)
    x = _x(1, blocks - first, 16).view(1, -1, 2, 8)
    positions = [j * cfg.nsa.d for j in range(first, blocks)]
    want = oracle.rotate(x, positions, cfg.rope_theta, cfg.rope_scale) if positions else x
    torch.testing.assert_close(rope.blocks(x, first), want, rtol=1e-12, atol=1e-12)


def test_rotation_and_pooling_keep_their_precision_under_autocast():
    """In bf16 the products of the rotation would be off by 2^-9 each, a sum of many tokens by more."""
    layer = _layer("small").float()
    rope, x = Rope.of(layer.cfg, 0, 64, "cpu", torch.float32), _x(1, 64, 16).float().view(1, 64, 2, 8)
    plain = rope.tokens(x), compress(x, MeanPhi(), layer.cfg.nsa)
    with torch.autocast("cpu", torch.bfloat16):
        cast = rope.tokens(x), compress(x, MeanPhi(), layer.cfg.nsa)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_all_lengths_up_to_a_power_of_two_share_one_table():
    cfg = _layer().cfg
    tables = [Rope.of(cfg, start, T, "cpu", torch.float64).cos for start, T in ((0, 300), (511, 1), (200, 56))]
    assert len({t.untyped_storage().data_ptr() for t in tables[:2]}) == 1
    assert tables[1].storage_offset() == 511 * cfg.d_k


def test_the_rotation_of_a_cache_is_that_of_its_next_positions():
    """Whatever was asked before: few or many positions, rewound, under another mode."""
    cfg, x = _layer().cfg, _x(1, 1)
    cache = KVCache(cfg, 1, 2000, device="cpu", dtype=torch.float64)
    for length, T in ((0, 7), (7, 1), (255, 1), (256, 1), (250, 9), (100, 1), (900, 700), (1600, 3), (1601, 1)):
        cache.layers[0].length = length
        with torch.inference_mode(length % 2 == 0):
            got, want = cache.rope(T, x), Rope.of(cfg, length, T, x.device, x.dtype)
        assert got.start == want.start
        torch.testing.assert_close(vars(got), vars(want), rtol=0, atol=0)
    assert cache.rope(1, x.float()).cos.dtype == torch.float32
    leaf = _x(1, 1, 16).view(1, 1, 2, 8).requires_grad_()
    with torch.inference_mode():
        cache.rope(1, x)
    cache.rope(1, x).tokens(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("huge", [1e3, -1e15])
def test_the_future_changes_no_output_of_the_layer_bit_for_bit(huge):
    layer, x = _layer(phi="mlp"), _x(1, 65)
    before = _forward(layer, x)
    for s in (1, 7, 8, 15, 16, 40, 64):
        changed = x.clone()
        changed[:, s:] = huge
        assert torch.equal(_forward(layer, changed)[:, :s], before[:, :s]), s


def test_a_sequence_past_the_cache_is_refused_with_both_numbers():
    layer, x = _layer(), _x(1, 21)
    cache = KVCache(layer.cfg, 1, 20, device="cpu", dtype=torch.float64).layers[0]
    rope = Rope.of(layer.cfg, 0, 21, "cpu", torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match=r"20.*21|21.*20"):
        layer(x, rope, cache)


def test_a_rewound_cache_decodes_the_same_token_again():
    layer, x = _layer(), _x(2, 90)
    cache = KVCache(layer.cfg, 2, 90, device="cpu", dtype=torch.float64)

    def step(start, stop):
        with torch.no_grad():
            return layer(x[:, start:stop], Rope.of(layer.cfg, start, stop - start, "cpu", x.dtype), cache.layers[0])

    step(0, 80)
    first = step(80, 81)
    for _ in range(20):
        cache.rewind(1)
        assert torch.equal(step(80, 81), first)
    torch.testing.assert_close(step(81, 90), _forward(layer, x)[:, 81:], rtol=1e-12, atol=1e-12)
