"""The core of a layer in Triton on a GPU: one operator, output and every gradient against the specification in fp64;
few launches, equal bits, and one node for torch.compile."""

import dataclasses

import pytest
import torch

from nsa import NSAConfig, sparse_attention
from nsa.tests import core_cases as cases

HALF = torch.bfloat16
PAPER = NSAConfig(n_sel=6, w=100)


@pytest.fixture(autouse=True)
def _triton(needs):
    for op in ("compressed", "selection", "selected", "window", "combine"):
        needs(op, "triton")


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(2, 700, 700, 2, 6, 64, 64), (1, 300, 900, 1, 16, 128, 64), (1, 5, 999, 2, 3, 32, 32)]
)
def test_the_core_is_the_sum_of_its_parts(shape, dtype, gate):
    assert cases.excess(shape, dataclasses.replace(PAPER, gate=gate), dtype, device="cuda") == {}


def test_long_enough_for_lists():
    assert cases.excess((1, 600, 5000, 2, 6, 64, 64), PAPER, HALF, device="cuda") == {}


def test_where_everything_is_chosen_nothing_is_listed():
    assert cases.excess((2, 380, 380, 2, 6, 64, 64), PAPER, HALF, choose=True, device="cuda") == {}


def test_ragged_rows():
    assert cases.excess((3, 40, 700, 2, 6, 64, 64), PAPER, HALF, lengths=[700, 40, 333], device="cuda") == {}


def _step(S):
    *given, dout = cases.tensors((1, S, S, 2, 6, 64, 64), NSAConfig(), HALF, "cuda")
    leaves = [x.requires_grad_() for x in given]

    def run(*leaves):
        q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, logits = leaves
        pairs = (k_cmp, v_cmp), (k_sel, v_sel), (k_win, v_win)
        return sparse_attention(q, *pairs, logits, NSAConfig(), seq_len=S, backend="triton")

    return run, leaves, dout


@pytest.mark.parametrize("S", [4096, 8192])
def test_equal_steps_are_equal_bit_for_bit(S):
    run, leaves, dout = _step(S)
    steps = [(out := run(*leaves), *torch.autograd.grad(out, leaves, dout)) for _ in range(3)]
    assert all(torch.equal(a, b) for other in steps[1:] for a, b in zip(steps[0], other, strict=True))


def test_a_step_of_4096_is_twelve_launches_each_way():
    run, leaves, dout = _step(4096)
    torch.autograd.grad(run(*leaves), leaves, dout)
    held = []
    for step in (lambda: held.append(run(*leaves)), lambda: torch.autograd.grad(held[0], leaves, dout)):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        assert 0 < sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events()) <= 12


def test_a_compiled_step_is_the_same_step():
    run, leaves, dout = _step(1500)
    out = run(*leaves)
    want = (out, *torch.autograd.grad(out, leaves, dout))
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert all(torch.equal(a, b) for a, b in zip((out, *torch.autograd.grad(out, leaves, dout)), want, strict=True))
