"""The whole model: one computation whether trained, prefilled in tiles, decoded, checkpointed or compiled."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nsa import (
    KVCache,
    NativeSparseAttention,
    Transformer,
    compressed_attention,
    routing,
    select_blocks,
    selected_attention,
    sliding_window_attention,
    sparse_attention,
)
from nsa.config import ModelConfig
from nsa.ops.linear_cross_entropy import linear_cross_entropy
from nsa.rope import Rope
from nsa.testing import fixed_selection, inputs, oracle, shapes

PHIS = ("avg", "linear", "mlp")


def _config(**changes):
    nsa = dataclasses.replace(shapes.PATTERNS["small"], **changes)
    return ModelConfig(vocab_size=31, dim=16, n_layers=2, n_heads=6, n_kv_groups=2, d_k=8, d_v=4, nsa=nsa)


def _model(dtype=torch.float64, **changes):
    torch.manual_seed(2)
    model = Transformer(_config(**changes)).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def _ids(B, S, seed=0):
    return torch.randint(31, (B, S), generator=torch.Generator().manual_seed(seed))


def _cache(model, B, S):
    return KVCache(model.cfg, B, S, device="cpu", dtype=model.embed.weight.dtype)


@torch.no_grad()
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_training_equals_tiles_equals_decode_through_all_layers(phi, gate):
    model, ids = _model(phi=phi, gate=gate), _ids(2, 80)
    want = model(ids)
    for tiles in ([1] * 80, [77, 3], [16] * 5, [74, 1, 5]):
        cache, start, outs = _cache(model, 2, 80), 0, []
        for tile in tiles:
            outs.append(model(ids[:, start : start + tile], cache))
            start += tile
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-12, atol=1e-12)
        assert cache.length == 80


@torch.no_grad()
def test_the_last_logits_alone_are_the_last_of_all():
    model, ids = _model(), _ids(2, 40)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_generation_is_the_argmax_of_the_training_forward_at_every_step():
    model, ids = _model(), _ids(2, 13)
    want = ids
    for _ in range(20):
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 20), want)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (5,)])
def test_ids_that_hold_no_token_or_no_batch_are_named(shape):
    model = _model()
    for call in (model, lambda ids: model.generate(ids, 1) if ids.dim() == 2 else model(ids)):
        with pytest.raises(ValueError, match=r"ids have shape .*expected \[B, T\]"):
            call(torch.zeros(shape, dtype=torch.int64))


def test_a_cache_of_other_rows_or_of_another_model_is_refused_and_left_as_it_was():
    model, ids = _model(), _ids(2, 9)
    for other, said in (
        (_cache(model, 3, 20), "3 batch rows, but ids have 2"),
        (_cache(_model(w=9), 2, 20), "another"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=said):
            model(ids, other)
        assert [layer.length for layer in other.layers] == [0, 0]


@pytest.mark.parametrize(("count", "temperature"), [(-1, 0.0), (2, -0.5), (2, float("nan"))])
def test_generation_refuses_what_has_no_meaning(count, temperature):
    with pytest.raises(ValueError, match="neither may be below 0"):
        _model().generate(_ids(1, 5), count, temperature=temperature)


def test_sampling_repeats_with_its_generator():
    model, ids = _model(), _ids(1, 5)
    runs = [model.generate(ids, 30, temperature=1.0, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("T", [40, 1100])
def test_the_loss_is_the_mean_cross_entropy_of_the_targets_that_count(T):
    model, ids, targets = _model(), _ids(2, T), _ids(2, T, seed=1)
    targets[0, :7], targets[1, -1] = -100, -100
    want = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    got = model.loss(ids, targets)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_checkpointing_changes_no_gradient_and_chooses_blocks_once_a_step():
    model, ids, targets = _model(), _ids(2, 70), _ids(2, 70, seed=1)
    gradients, selections = [], []
    for model.gradient_checkpointing in (False, True):
        before = _launches("selection")
        model.zero_grad()
        model.loss(ids, targets).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        selections.append(_launches("selection") - before)
    assert selections == [model.cfg.n_layers] * 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.fixture
def two_threads():
    """Races need a second thread; stage 1 runs with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_training_steps_are_equal_bit_for_bit(two_threads, checkpointing):
    """A gather by repeated indices adds its gradients in a racing order."""
    model, ids, targets = _model(torch.float32, phi="mlp"), _ids(2, 400), _ids(2, 400, seed=1)
    model.gradient_checkpointing = checkpointing
    steps = []
    for _ in range(2):
        model.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        steps.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


def _launches(op):
    return sum(count for (name, _), count in routing.launches.items() if name == op)


def test_the_backward_uses_the_choice_of_the_forward():
    """Selection runs once a forward and never in a backward."""
    model, ids = _model(), _ids(1, 70)
    loss = model.loss(ids, ids)
    before = _launches("selection")
    loss.backward()
    assert _launches("selection") == before


def test_every_parameter_learns():
    model, ids, targets = _model(phi="mlp"), _ids(2, 70), _ids(2, 70, seed=1)
    model.loss(ids, targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("S", [1, 7])
def test_a_sequence_too_short_to_compress_leaves_no_gradient_out(S):
    model = _model(phi="linear")
    model.loss(_ids(2, S), _ids(2, S, seed=1)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_to_bfloat16_stays_near_single_precision(grad):
    model, ids, targets = _model(torch.float32), _ids(2, 100), _ids(2, 100, seed=1)
    with torch.set_grad_enabled(grad):
        exact = model.loss(ids, targets)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.loss(ids, targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)
    if grad:
        rough.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_autocast_decodes_through_a_bfloat16_cache():
    model, ids = _model(torch.float32), _ids(1, 60)
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(model.cfg, 1, 60, device="cpu", dtype=torch.bfloat16)
        tiled = torch.cat([model(ids[:, :50], cache)] + [model(ids[:, i : i + 1], cache) for i in range(50, 60)], 1)
        whole = model(ids)
    agree = (tiled.argmax(-1) == whole.argmax(-1)).float().mean()
    assert agree > 0.9, f"{float(agree):.0%} of the tokens agree"


# Custom operators under the compiler


def test_the_layer_compiles_to_one_graph_for_every_length():
    """A graph for the first length, one for all others; no break, forward or backward.

    torch 2.4 fixes the product of batch and length in each graph, whatever is marked dynamic: a graph a length there.
    """
    nsa = dataclasses.replace(shapes.PATTERNS["small"], phi="mlp")
    layer = NativeSparseAttention(ModelConfig(dim=16, n_heads=4, n_kv_groups=2, d_k=8, d_v=8, nsa=nsa)).double()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, rope: layer(x, rope), fullgraph=True, dynamic=True, backend=count)
    for S in (40, 65, 111):
        generator = torch.Generator().manual_seed(S)
        x = torch.randn(2, S, 16, generator=generator, dtype=torch.float64)
        grad = torch.randn(2, S, 16, generator=generator, dtype=torch.float64)
        rope = Rope.of(layer.cfg, 0, S, torch.device("cpu"), torch.float64)
        results = []
        for forward in (layer, compiled):
            leaf = x.clone().requires_grad_()
            out = forward(leaf, rope)
            results.append([out, *torch.autograd.grad(out, [leaf, *layer.parameters()], grad)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    most = 3 if torch.__version__.startswith("2.4.") else 2
    assert len(graphs) <= most, f"{len(graphs)} graphs for three lengths"


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every call to one of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nsa":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("T", "Dk", "Dv"), [(33, 8, 8), (1, 8, 6), (4, 8, 6), (33, 6, 8)])
def test_every_custom_operator_passes_opcheck(ragged, T, Dk, Dv):
    """Schema, fake tensors (strides too) and autograd registration of each operator, on permuted inputs."""
    cfg, S = shapes.PATTERNS["small"], 65
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs(2, T, S, Dk=Dk, Dv=Dv))
    C = len(oracle.compressed_spans(S, cfg))
    seq_len = torch.tensor([S, 40], dtype=torch.int32) if ragged else S
    chosen = fixed_selection(2, T, 2, 40, cfg)
    with _Recorder() as recorder:
        cmp, lse = compressed_attention(q, k[:, :C], v[:, :C], cfg, seq_len=seq_len)
        select_blocks(q, k[:, :C], lse, cfg, seq_len=seq_len)
        sel = selected_attention(q, k, v, chosen, cfg, seq_len=seq_len)
        win = sliding_window_attention(q, k, v, cfg, seq_len=seq_len)
        logits = torch.randn(2, T, 4, 3, dtype=q.dtype).requires_grad_()
        # Off a GPU `combine` goes without its operator.
        out = torch.ops.nsa.combine(cmp, sel, win, logits, True, None)
        pair = k[:, :C], v[:, :C]
        out = out + sparse_attention(q, pair, (k, v), (k, v), logits, cfg, seq_len=seq_len)
        out.sum().backward()
        states, weight = (torch.randn(n, 5, dtype=q.dtype).requires_grad_() for n in (9, 7))
        linear_cross_entropy(states, weight, torch.arange(9) % 7).backward()
    seen = {func.name() for func, _ in recorder.calls}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nsa::")}
    assert seen == registered, f"never called: {registered - seen}"
    for func, args in recorder.calls:
        learns = not func.name().endswith("_backward") and func.name() != "nsa::select_blocks"
        leaves = [
            a.detach().clone().requires_grad_(learns and a.is_floating_point()) if isinstance(a, torch.Tensor) else a
            for a in args
        ]
        torch.library.opcheck(func, tuple(leaves))
