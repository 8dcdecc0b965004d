"""Which flash-attention this machine has: the flash-attn package, or torch's own kernels."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import torch


def flash_attn_version() -> str | None:
    """Version of the flash-attn package if it is installed, whole and importable here; else None."""
    try:
        importlib.import_module("flash_attn_2_cuda")
        return importlib.metadata.version("flash-attn")
    except (ImportError, OSError):
        return None


def _cuda_runs_flash() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def is_flash_available() -> bool:
    """Whether dense FA-2 runs on this machine's GPU."""
    return _cuda_runs_flash() and (
        flash_attn_version() is not None or hasattr(torch.ops.aten, "_flash_attention_forward")
    )


def varlen_provider() -> str | None:
    """Who runs variable-length FA-2 here: flash-attn, torch.nn.attention.varlen, aten's flash op, or nobody."""
    if not _cuda_runs_flash():
        return None
    if flash_attn_version() is not None:
        return "flash-attn"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "torch.nn.attention.varlen"
    return "aten._flash_attention_forward" if hasattr(torch.ops.aten, "_flash_attention_forward") else None


def is_flash_varlen_available() -> bool:
    """Whether variable-length FA-2 runs on this machine, from flash-attn or from torch itself."""
    return varlen_provider() is not None
