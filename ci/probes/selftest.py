"""Does this GPU compute? A matmul and a Triton kernel with known answers; does flash-attn import? JSON on stdout."""

from __future__ import annotations

import importlib
import importlib.util
import json

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _add(x, y, out, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)


def matmul(device: str) -> str:
    """Small integers multiply exactly in fp32, so any difference is a broken device. Empty string: correct."""
    rows = (torch.arange(512 * 512, device=device) % 7).reshape(512, 512).float()
    wrong = (rows @ rows).cpu() != (rows.cpu().double() @ rows.cpu().double()).float()
    return f"{int(wrong.sum())} of {wrong.numel()} products are wrong" if wrong.any() else ""


def triton_add(device: str) -> str:
    """A vector add through Triton's compiler and launcher. Empty string: correct."""
    if triton is None:
        return "triton is not installed"
    x, y = torch.arange(1000.0, device=device), torch.ones(1000, device=device)
    out = torch.full((1000,), float("nan"), device=device)
    try:
        _add[(4,)](x, y, out, 1000, BLOCK=256)
    except (RuntimeError, OSError) as error:  # no C compiler, no Python headers, no driver library
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "" if torch.equal(out, x + 1) else "the sum is wrong"


def flash_attn() -> str:
    """Empty string: it imports. An ABI mismatch shows as the missing symbol."""
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed"
    try:
        importlib.import_module("flash_attn_2_cuda")
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    report = {name: {"matmul": matmul(name), "triton_add": triton_add(name)} for name in devices}
    print(json.dumps({"devices": report, "flash_attn": flash_attn()}))
