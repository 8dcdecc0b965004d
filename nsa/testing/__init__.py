"""Helpers that tests and benchmarks share: the token-loop oracle, the error budget, inputs and shapes."""

from nsa.testing.budget import (
    assert_low_regret,
    assert_same,
    assert_within_budget,
    check_blocks,
    eager,
    regrets,
    within_budget,
)
from nsa.testing.shapes import Inputs, allowed_mask, fixed_selection, inputs, pairwise

__all__ = [
    "Inputs",
    "allowed_mask",
    "assert_low_regret",
    "assert_same",
    "assert_within_budget",
    "check_blocks",
    "eager",
    "fixed_selection",
    "inputs",
    "pairwise",
    "regrets",
    "within_budget",
]
