"""The gated sum on a GPU: Triton no further from fp64 than the plain form, and what runs where it may not."""

import pytest
import torch

from nsa import NSAConfig, combine, routing
from nsa.testing import within_budget
from nsa.tests import combine_cases as cases

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows that fill no program; more programs than a card runs at once; a head dim that is no power of two; one token.
SHAPES = ((2, 333, 12, 64), (1, 2049, 64, 128), (3, 65, 5, 48), (1, 1, 12, 64))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_no_further_off_than_the_plain_form(needs, launched, dtype, softmax):
    needs("combine", "triton", dtype)
    for shape in SHAPES:
        for contiguous in (True, False):
            inputs = cases.tensors(shape, dtype, contiguous=contiguous, device="cuda")
            with launched("combine", "triton"), launched("combine_backward", "triton"):
                got = cases.by_autograd(inputs, softmax, dtype, "triton")
            assert cases.complaints(inputs, tuple(got), softmax) == [], f"{shape}, contiguous: {contiguous}"


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_that_hands_on_gates_and_deltas(needs, dtype, softmax):
    needs("combine", "triton", dtype)
    for shape in SHAPES:
        for contiguous in (True, False):
            inputs = cases.tensors(shape, dtype, contiguous=contiguous, device="cuda")
            assert cases.folded(inputs, softmax) == [], f"{shape}, contiguous: {contiguous}"
            if contiguous:
                inputs[4] = cases.in_a_wider_row(inputs[4])
                assert cases.folded(inputs, softmax) == [], f"{shape}, logits of a fused projection"


def test_equal_runs_are_equal_bit_for_bit(needs, launched):
    needs("combine", "triton")
    inputs = cases.tensors((2, 333, 12, 64), torch.bfloat16, device="cuda")
    with launched("combine_backward", "triton"):
        first = cases.by_autograd(inputs, True, torch.bfloat16, "triton")
    for _ in range(3):
        again = cases.by_autograd(inputs, True, torch.bfloat16, "triton")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_no_tensor_of_an_outputs_size_is_made_besides_the_results(needs, launched):
    needs("combine", "triton")
    cmp, sel, win, dout, logits = cases.tensors((1, 4096, 16, 64), torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in (cmp, sel, win, logits)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, one = torch.cuda.memory_allocated(), cmp.numel() * cmp.element_size()
    with launched("combine_backward", "triton"):
        out = combine(*leaves, NSAConfig(), backend="triton")
        grads = torch.autograd.grad(out, leaves, dout)
    results = sum(x.numel() * x.element_size() for x in (out, *grads))
    assert torch.cuda.max_memory_allocated() - before < results + one // 4


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_compiled_it_is_one_graph_with_the_same_numbers(needs, launched, gate):
    needs("combine", "triton")
    cmp, sel, win, dout, logits = cases.tensors((1, 130, 6, 64), torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in (cmp, sel, win, logits)]
    results = []
    for call in (combine, torch.compile(combine, fullgraph=True)):
        with launched("combine", "triton"), launched("combine_backward", "triton"):
            out = call(*leaves, NSAConfig(gate=gate), backend="triton")
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_token_costs_no_operator(needs):
    needs("combine", "triton")
    inputs = cases.tensors((4, 1, 12, 64), torch.bfloat16, device="cuda")
    before = routing.launches.copy()
    cases.by_autograd(inputs, False, torch.bfloat16, None)
    assert routing.launches == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_unasked_it_is_right_whatever_runs(needs, dtype):
    """Proven on this card or not; fp64 is no kernel's."""
    needs("combine", "triton")
    inputs = [x.to(dtype) for x in cases.tensors((2, 1333, 12, 64), torch.float32, device="cuda")]
    before = routing.launches.copy()
    got = cases.by_autograd(inputs, True, dtype, None)
    assert {op for op, _ in routing.launches - before} == {"combine", "combine_backward"}
    exact = cases.by_autograd(inputs, True, torch.float64, "reference")
    if dtype == torch.float64:
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    else:
        plain = cases.by_autograd(inputs, True, dtype, "reference")
        assert [
            c for n, a, b, e in zip(cases.NAMES, got, plain, exact, strict=True) for c in within_budget(a, b, e, n)
        ] == []
