"""Native Sparse Attention (arXiv 2502.11089): compressed, selected and sliding-window branches, gated.

Axes, everywhere: B batch, T queries, S positions so far (the T queries are the last T of them), H query heads,
G key/value groups, R = H/G heads a group, D head dim (Dk of keys, Dv of values), C compressed blocks,
M selection blocks, N selected slots. Layout is [B, T, heads, D].

Importing this package imports nothing else; a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "NSAConfig": "nsa.config",
    "ModelConfig": "nsa.config",
    "NativeSparseAttention": "nsa.attention",
    "KVCache": "nsa.cache",
    "Transformer": "nsa.model",
    "sparse_attention": "nsa.ops.attention",
    "compress": "nsa.ops.compress",
    "compressed_attention": "nsa.ops.compressed",
    "select_blocks": "nsa.ops.selection",
    "selected_attention": "nsa.ops.selected",
    "sliding_window_attention": "nsa.ops.window",
    "combine": "nsa.ops.combine",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nsa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
