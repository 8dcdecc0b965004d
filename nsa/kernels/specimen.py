"""One launch of one kernel, described well enough to be compiled where there is no GPU."""

from __future__ import annotations

from typing import Any, NamedTuple


class Specimen(NamedTuple):
    """What a kernel module's `specimens(sm)` lists, one for each entry of its launch tables.

    name        "module.kernel" and what tells the entry from others
    kernel      the @triton.jit function
    signature   run-time arguments in Triton's notation: "*bf16", "i32", "fp32"; with ":16" appended where the value
                is known to be divisible by 16 (aligned pointers, strides of rows), ":1" where it is 1 (unit strides)
    constants   the constexpr arguments
    async_copies  whether loads in a loop must be pipelined: cp.async or its successor must appear in the code
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    async_copies: bool = False
