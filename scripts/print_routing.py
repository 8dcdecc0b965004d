"""Print, as JSON, what this machine has and which backend every op would take, with the reasons against the others.

`plan` is what a layer of the given shape would run, by default a training step of the 125M model's.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
from typing import Any

import torch

from nsa import cli, routing
from nsa.blocks import n_compressed
from nsa.config import ModelConfig
from nsa.plan import Plan

DTYPES = ("bfloat16", "float16", "float32")


def main() -> int:
    parser = cli.Parser(prog="print_routing", description="What runs on this machine, and why not something else.")
    cli.add_layer_flags(parser, B=8, dim=768, heads=12, groups=2, dk=64, dv=64, l=32, d=16, l_sel=64, n_sel=16, w=512)
    parser.add_argument("--S", type=cli.at_least_one, default=4096, help="positions (%(default)s)")
    parser.add_argument("--T", type=cli.at_least_one, help="queries, the last of the positions (all)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the attention (%(default)s)")
    args = parser.parse_args()
    cfg = cli.layer_config(parser, args)
    T = args.S if args.T is None else args.T
    if args.S < T:
        parser.error(f"argument --T: {T} queries are more than --S {args.S}")
    print(json.dumps({**routing.snapshot(), "plan": plan(cfg, args.B, T, args.S, args.dtype)}, indent=2))
    return 0


def plan(cfg: ModelConfig, B: int, T: int, S: int, dtype: str) -> dict[str, Any]:
    """The routes of one layer, of inputs that have a shape and no memory."""
    one = torch.zeros((), dtype=getattr(torch, dtype), device="cuda" if torch.cuda.is_available() else "cpu")
    q, logits = one.expand(B, T, cfg.n_heads, cfg.d_k), one.expand(B, T, cfg.n_heads, 3)
    C = n_compressed(S, cfg.nsa)
    k, v = (one.expand(B, C, cfg.n_kv_groups, width) for width in (cfg.d_k, cfg.d_v))
    shape = {"B": B, "T": T, "S": S, "heads": cfg.n_heads, "groups": cfg.n_kv_groups, "dk": cfg.d_k, "dv": cfg.d_v}
    ways = {
        way: Plan.of(q, k, v, logits, cfg.nsa.pattern, S, training=way == "training").as_dict()
        for way in ("forward", "training")
    }
    return {"shape": {**shape, "dtype": dtype}, **ways}


if __name__ == "__main__":
    sys.exit(main())
