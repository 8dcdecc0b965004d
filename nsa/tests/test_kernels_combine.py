"""The Triton kernels of the gated sum, interpreted on a CPU: output and gradients no further from fp64 than the
plain form's.

Every case runs with uninitialised memory poisoned and every address of a load or store checked against the tensors.
"""

import pytest
import torch

from nsa import NSAConfig, combine, routing
from nsa.tests import combine_cases as cases
from nsa.tests.test_kernels_selected import _bounds_checked

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _check(shape, dtype, softmax, **more):
    inputs = cases.tensors(shape, dtype, **more)
    return cases.complaints(inputs, cases.by_kernel(inputs, softmax, _bounds_checked), softmax)


def _strided(shape, dtype, softmax):
    return _check(shape, dtype, softmax, contiguous=False)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 70, 6, 64), (2, 33, 3, 128), (1, 1, 12, 64), (2, 19, 5, 48), (1, 9, 2, 7)])
def test_output_and_gradients_in_every_type(interpreted, shape, dtype, softmax):
    assert interpreted(_check, shape, dtype, softmax) == []


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("shape", [(2, 33, 3, 32), (1, 1, 5, 16), (3, 1, 1, 64), (1, 21, 1, 20)])
def test_any_strides(interpreted, shape, softmax):
    assert interpreted(_strided, shape, torch.float32, softmax) == []


def _folded(shape, dtype, softmax, kind):
    inputs = cases.tensors(shape, dtype, contiguous=kind != "strided")
    if kind == "fused":
        inputs[4] = cases.in_a_wider_row(inputs[4])
    if kind == "saturated":
        inputs[4][:, ::2] = torch.tensor([-200.0, 0.0, 200.0])
    return cases.folded(inputs, softmax, _bounds_checked)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("kind", ["contiguous", "fused", "strided", "saturated"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 33, 3, 128), DTYPES[0]), ((1, 70, 6, 64), DTYPES[2]), ((3, 1, 5, 48), DTYPES[1]), ((2, 9, 1, 7), DTYPES[2])],
)
def test_the_backward_that_hands_on_gates_and_deltas(interpreted, shape, dtype, softmax, kind):
    assert interpreted(_folded, shape, dtype, softmax, kind) == []


def _layouts():
    from nsa.kernels.combine import logits_rows

    x = torch.zeros(2, 4, 5, 3)
    wide = cases.in_a_wider_row(x)
    cut = torch.zeros(2, 6, 5, 3)[:, :4]
    layouts = (x, wide, wide[:, :1], cut[:1], cut, x.movedim(-1, 0).contiguous().movedim(0, -1))
    return [(logits_rows(y)[:2], logits_rows(y)[2] is y) for y in layouts]


def test_logits_are_copied_only_where_their_tokens_do_not_follow_each_other(interpreted):
    """As they are: columns of a wider row, one token of each sequence, one sequence. Not: a cut within the batch."""
    assert interpreted(_layouts) == [
        *[((15, 3), True), ((20, 3), True), ((80, 3), True), ((15, 3), True)],
        *[((15, 3), False)] * 2,
    ]


def _fused():
    inputs = cases.tensors((2, 33, 3, 32), torch.float32)
    inputs[4] = cases.in_a_wider_row(inputs[4])
    return cases.complaints(inputs, cases.by_kernel(inputs, True, _bounds_checked), True)


def test_logits_among_the_columns_of_a_fused_projection(interpreted):
    assert interpreted(_fused) == []


def _extreme(softmax):
    """Logits that saturate, and a gate whose exp would overflow."""
    inputs = cases.tensors((1, 40, 3, 16), torch.float32)
    inputs[4][0, :20] = torch.tensor([-200.0, 0.0, 200.0])
    inputs[4][0, 20:] = torch.tensor([float("-inf"), -90.0, 90.0])
    return cases.complaints(inputs, cases.by_kernel(inputs, softmax, _bounds_checked), softmax)


@pytest.mark.parametrize("softmax", [False, True])
def test_gates_that_saturate_stay_finite(interpreted, softmax):
    assert interpreted(_extreme, softmax) == []


def _mixed():
    inputs = cases.tensors((1, 20, 3, 32), torch.bfloat16)
    inputs[4] = inputs[4].float()
    got = cases.by_kernel(inputs, False, _bounds_checked)
    same = cases.tensors((1, 20, 3, 32), torch.bfloat16)
    found = cases.complaints(same, (*got[:4], got[4].bfloat16()), False)
    return [x.dtype for x in got], found


def test_logits_of_another_type_than_the_branches(interpreted):
    dtypes, found = interpreted(_mixed)
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32]
    assert found == []


def _nan():
    inputs = cases.tensors((1, 4, 1, 16), torch.float32)
    inputs[4][0, 2, 0, 1] = float("nan")
    out, *_, d_logits = cases.by_kernel(inputs, False)
    return out.isnan().any(-1).flatten().tolist(), d_logits.isnan().any(-1).flatten().tolist()


def test_a_gate_that_is_not_a_number_is_not_hidden(interpreted):
    assert interpreted(_nan) == ([False, False, True, False],) * 2


def _repeated():
    inputs = cases.tensors((2, 33, 3, 32), torch.bfloat16)
    runs = [cases.by_kernel(inputs, True) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_equal_runs_are_equal(interpreted):
    assert interpreted(_repeated)


def _reasons():
    from nsa.kernels.combine import unsupported

    x = torch.zeros(1, 1, 1, 8)
    return unsupported("triton", x, x.half(), x.bfloat16(), x), unsupported("triton", x, x, x, x.double())


def test_what_cannot_run_is_refused_with_its_reason(interpreted):
    fine, double = interpreted(_reasons)
    assert fine == []
    assert double == ["triton takes bf16, fp16 or fp32, not torch.float64"]


# The operator without a kernel, and routing


@pytest.mark.parametrize("softmax", [False, True])
def test_without_a_kernel_the_operator_has_the_gradients_of_the_plain_form(softmax):
    inputs = cases.tensors((2, 9, 3, 8), torch.float64, contiguous=False)
    cmp, sel, win, dout, logits = inputs
    leaves = [x.clone().requires_grad_() for x in (cmp, sel, win, logits)]
    before = routing.launches.copy()
    out = torch.ops.nsa.combine(*leaves, softmax, None)
    got = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    assert routing.launches - before == {("combine", "reference"): 1, ("combine_backward", "reference"): 1}
    for a, b in zip(got, cases.by_autograd(inputs, softmax, torch.float64, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, s, w, g: (c, s[:, :2], w, g), r"sel is torch.float32 \(1, 2, 3, 8\); expected cmp's"),
        (lambda c, s, w, g: (c, s, w.half(), g), "win is torch.float16 .*expected cmp's, torch.float32"),
        (lambda c, s, w, g: (c, s, w, g[..., :2]), r"logits have shape \(1, 4, 3, 2\); expected \[1, 4, 3, 3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, said):
    cmp, sel, win, _, logits = cases.tensors((1, 4, 3, 8), torch.float32)
    with pytest.raises(ValueError, match=said):
        combine(*change(cmp, sel, win, logits), NSAConfig())


def test_a_kernel_asked_for_where_it_cannot_run_is_refused():
    cmp, sel, win, _, logits = cases.tensors((1, 4, 3, 8), torch.float32)
    with pytest.raises(routing.Unsupported, match="combine: backend 'triton' cannot run: needs CUDA"):
        combine(cmp, sel, win, logits, NSAConfig(), backend="triton")


def test_the_sum_is_taken_where_it_was_measured_and_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(routing, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(routing, "flags", lambda: routing.Flags())
    monkeypatch.setattr(routing, "TRITON_PROOF", {"combine": {80: "measured"}})
    unasked = routing.choose("combine")
    assert (unasked.backend, unasked.rejected["triton"]) == (
        "reference",
        ["not measured on sm_90 yet, not even compiled for it: NSA_USE_TRITON_SEL=1 asks for it"],
    )
    assert routing.choose("combine", backend="triton").backend == "triton"
    monkeypatch.setattr(routing, "flags", lambda: routing.Flags(use_triton_sel=True))
    assert routing.choose("combine").backend == "triton"
    monkeypatch.setattr(routing, "TRITON_PROOF", {"combine": {90: "measured"}})
    monkeypatch.setattr(routing, "flags", lambda: routing.Flags(use_triton_sel=False))
    assert routing.choose("combine").backend == "triton"
