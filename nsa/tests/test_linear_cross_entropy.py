"""The head's loss and gradients in one operator: exact where the inputs are, whatever the chunks; padding unseen."""

import math

import pytest
import torch
import torch.nn.functional as F

from nsa import ModelConfig, Transformer, routing
from nsa.ops.linear_cross_entropy import linear_cross_entropy, padded, padded_linear
from nsa.tests import cross_entropy_cases as cases
from nsa.tests.test_kernels_selected import _bounds_checked


def _inputs(N, V, dim=16, dtype=torch.float64, ignored=7):
    generator = torch.Generator().manual_seed(N + V)
    x, weight = (torch.randn(n, dim, generator=generator, dtype=dtype).requires_grad_() for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::ignored] = -100
    return x, weight, targets


def _chunk(tiles, V, itemsize):
    """Bytes of `tiles` times 128 tokens' logits."""
    return tiles * 128 * padded(V) * itemsize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("V", [1, 31, 128, 257])
@pytest.mark.parametrize(("N", "tiles"), [(1, 1), (5, 100), (300, 1), (1000, 3), (384, 1)])
def test_loss_and_gradients_are_those_of_whole_logits(V, N, tiles, dtype):
    x, weight, targets = _inputs(N, V, dtype=dtype)
    want = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    got = linear_cross_entropy(x, weight, targets, chunk_bytes=_chunk(tiles, V, dtype.itemsize))
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, want, **close)
    for a, b in zip(*(torch.autograd.grad(0.3 * loss, (x, weight)) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b, **close)


def _relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def test_the_error_of_the_heads_gradient_does_not_grow_with_the_chunks():
    """Summed in bf16 over 32 chunks it was 1.7 times that of one."""
    x, weight, targets = _inputs(4096, 500, dim=32, dtype=torch.float32)
    exact = torch.autograd.grad(F.cross_entropy(x.double() @ weight.double().T, targets, reduction="sum"), (x, weight))
    errors = []
    for tiles in (32, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(x, weight, targets, chunk_bytes=_chunk(tiles, 500, 2))
        assert loss.dtype == torch.float32
        errors.append([_relative(a, b) for a, b in zip(torch.autograd.grad(loss, (x, weight)), exact, strict=True)])
    for one, many in zip(*errors, strict=True):
        assert many == pytest.approx(one, rel=0.01)
        assert one < 0.01


def test_targets_that_do_not_count_leave_nothing_not_even_of_states_that_are_not_numbers():
    x, weight, targets = _inputs(200, 31)
    targets[:] = -100
    loss = linear_cross_entropy(x, weight, targets)
    assert loss == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (x, weight)))
    targets[5:] = 3
    with torch.no_grad():
        x[:5] = float("nan")
    loss = linear_cross_entropy(x, weight, targets)
    d_x, _ = torch.autograd.grad(loss, (x, weight))
    assert loss.isfinite()
    assert not d_x[5:].isnan().any()


def test_a_gradient_is_computed_where_one_is_wanted():
    x, weight, targets = _inputs(40, 31)
    operator = torch.ops.nsa.linear_cross_entropy
    sizes = {}
    for wants in ((True, True), (False, True), (True, False), (False, False)):
        loss, *grads = operator(x.detach(), weight.detach(), targets, torch.float64, 1 << 20, *wants)
        sizes[wants] = [g.numel() for g in grads]
        torch.testing.assert_close(loss, operator(x, weight, targets, torch.float64, 1 << 20, True, True)[0])
    assert sizes == {(a, b): [a * 640, b * 496] for a in (True, False) for b in (True, False)}
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad
    frozen = linear_cross_entropy(x, weight.detach(), targets)
    assert torch.autograd.grad(frozen, x)[0].any()


def test_the_incoming_gradient_is_not_rounded_before_it_scales():
    """1/3 in bf16 is 0.2% off: every gradient below the head would be, too."""
    x, weight, targets = _inputs(64, 31, dtype=torch.bfloat16)
    (whole,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    (third,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets) / 3, x)
    torch.testing.assert_close(third, (whole.double() / 3).to(third.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, w, t: (x[None], w, t), r"are \(1, 5, 16\), \(31, 16\), \(5,\); expected \[N,dim\]"),
        (lambda x, w, t: (x, w[:, :3], t), "expected"),
        (lambda x, w, t: (x, w, t[:-1]), "expected"),
        (lambda x, w, t: (x, w, t.int()), "targets are torch.int32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(*change(*_inputs(5, 31)))


def test_a_target_beyond_the_vocabulary_is_refused_though_a_padded_column_stands_there():
    x, weight, targets = _inputs(5, 31)
    targets[1] = 40
    with pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize("rows", [3, 200])
def test_padded_logits_are_the_logits(rows):
    x, weight, _ = _inputs(rows, 31)
    got, want = padded_linear(x, weight), x @ weight.T
    grad = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_model_shows_its_vocabulary_and_nothing_of_the_padding():
    """At the start every real id is as likely as another: a padded one would take its share of the loss."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=131, dim=16, n_heads=2, n_kv_groups=1, d_k=8, d_v=8))
    ids = torch.randint(131, (2, 200))
    assert model.head.weight.shape == (131, 16)
    assert model(ids).shape == (2, 200, 131)
    assert float(model.loss(ids, ids.roll(1, 1)).detach()) == pytest.approx(math.log(131), rel=0.01)


# The Triton kernel, interpreted


def _check(rows, V, dtype, gradient=True):
    logits, targets = cases.tensors(rows, V, dtype)
    return cases.complaints(logits, targets, V, cases.by_kernel(logits, targets, V, _bounds_checked, gradient=gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "V"), [(9, 131), (1, 4096), (4, 4097), (3, 9000)])
def test_the_kernel_writes_loss_and_gradient(interpreted, rows, V, dtype):
    assert interpreted(_check, rows, V, dtype) == []


def _loss_alone():
    logits, targets = cases.tensors(5, 300, torch.float32)
    before = logits.clone()
    losses, after = cases.by_kernel(logits, targets, 300, _bounds_checked, gradient=False)
    return bool(torch.equal(after[:, :300], before[:, :300])), cases.complaints(before, targets, 300, (losses, None))


def test_the_kernel_leaves_logits_alone_where_no_gradient_is_wanted(interpreted):
    assert interpreted(_loss_alone) == (True, [])


def _extreme():
    logits, targets = cases.tensors(4, 300, torch.float32)
    logits[0, :300] = torch.linspace(-3e4, 3e4, 300)
    logits[1, 7], targets[1] = 1e30, 7
    return cases.complaints(logits, targets, 300, cases.by_kernel(logits, targets, 300))


def test_the_kernel_keeps_logits_that_would_overflow(interpreted):
    assert interpreted(_extreme) == []


def _bad_rows():
    logits, targets = cases.tensors(4, 300, torch.float32)
    targets[:] = torch.tensor([-100, 5, 300, -7])
    logits[0] = float("nan")
    losses, after = cases.by_kernel(logits, targets, 300, _bounds_checked)
    return losses.isnan().tolist(), bool(after[0].any()), bool(after[1].isfinite().all())


def test_the_kernel_gives_a_row_that_does_not_count_nothing_and_an_unknown_target_no_number(interpreted):
    """A padded column, 300 here, is no target either."""
    assert interpreted(_bad_rows) == ([False, False, True, True], False, True)


def _reasons():
    from nsa.kernels.cross_entropy import unsupported

    return unsupported("triton", torch.zeros(1, 128)), unsupported("triton", torch.zeros(1, 128).double())


def test_what_the_kernel_cannot_take_is_refused_with_its_reason(interpreted):
    assert interpreted(_reasons) == ([], ["triton takes bf16, fp16 or fp32, not torch.float64"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_is_as_near_as_the_plain_form_on_a_gpu(needs, launched, dtype):
    needs("combine", "triton", dtype)
    x, weight, targets = (t.detach().cuda() for t in _inputs(1000, 50257, dim=128, dtype=torch.float32))
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    with launched("cross_entropy", "triton"):
        loss = linear_cross_entropy(*leaves, targets, chunk_bytes=1 << 25)
    grads = torch.autograd.grad(loss, leaves)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert abs(float(loss.detach() - exact) / float(exact)) < bound
    for got, want in zip(grads, torch.autograd.grad(exact, wide), strict=True):
        assert _relative(got, want) < bound


def test_the_kernel_compiles_for_every_card(recorder):
    from nsa.kernels.cross_entropy import losses_

    for sm in (80, 89, 90):
        with recorder.recorded(sm) as recording:
            for dtype in (torch.bfloat16, torch.float32):
                logits = torch.empty(1280, 50304, dtype=dtype, device="meta")
                targets = torch.empty(1280, dtype=torch.int64, device="meta")
                losses = torch.empty(1280, device="meta")
                for gradient in (True, False):
                    losses_(logits, targets, 50257, losses, gradient=gradient)
        assert len(recording.launches) == 4
        for launch in recording.launches:
            row = recorder.measure(launch, sm)
            assert row["verdict"] == "fits", row
            assert row["spills"] == 0, row


@pytest.fixture
def recorder():
    if not routing.has_kernel("combine") or routing.triton_version() == "<none>":
        pytest.skip("needs Triton")
    from nsa.kernels import report

    return report
