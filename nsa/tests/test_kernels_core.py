"""The core of a layer by its Triton kernels, interpreted on a CPU: one operator, output and every gradient against the
specification, with the gates folded into the branches' backward and the lists handed to it."""

import dataclasses

import pytest
import torch

from nsa.tests import core_cases as cases
from nsa.tests.test_kernels_selected import _bounds_checked

FP32, HALF = torch.float32, torch.bfloat16


def _excess(shape, dtype=FP32, union=0, **more):
    """As if this machine were one where the kernels run."""
    from nsa import plan, routing
    from nsa.kernels import selected

    stock, bound = routing._environment, selected._UNION
    routing._environment, selected._UNION = lambda *_: [], union
    pattern = more.pop("pattern", {})
    plan._plans.clear()
    try:
        cfg = dataclasses.replace(cases.SMALL, **pattern)
        return cases.excess(shape, cfg, dtype, guard=_bounds_checked, **more)
    finally:
        routing._environment, selected._UNION = stock, bound
        plan._plans.clear()


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("shape", "dtype"), [((1, 40, 90, 2, 3, 16, 16), FP32), ((2, 33, 33, 1, 6, 32, 16), HALF)])
@pytest.mark.parametrize("union", [0, 4096])
def test_the_core_is_the_sum_of_its_parts(interpreted, gate, shape, dtype, union):
    assert interpreted(_call, shape, dtype, union, {"pattern": {"gate": gate}}) == {}


def _call(shape, dtype, union, more):
    return _excess(shape, dtype, union, **more)


def test_a_few_queries(interpreted):
    assert interpreted(_call, (2, 3, 70, 2, 3, 16, 16), FP32, 0, {}) == {}


def test_where_everything_is_chosen_nothing_is_listed(interpreted):
    assert interpreted(_call, (1, 40, 61, 1, 3, 16, 16), FP32, 0, {"choose": True}) == {}


def test_ragged_rows(interpreted):
    assert interpreted(_call, (3, 20, 85, 2, 3, 16, 16), FP32, 0, {"lengths": [85, 20, 50]}) == {}
