"""Prefill a long context through one NSA layer in real tiles, and check what it read against the formula.

Prints a summary to stdout; progress and errors go to stderr. Exits 1 if the measured reads are not the expected ones
or if memory was refused, 2 for flags that do not fit together.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from functools import partial

import torch

from nsa import cli, measure, routing
from nsa.attention import NativeSparseAttention
from nsa.blocks import Reads, reads_range
from nsa.cache import KVCache
from nsa.config import ModelConfig
from nsa.rope import Rope

DEFAULTS = {"B": 1, "dim": 512, "heads": 8, "groups": 2, "dk": 64, "dv": 64, "l": 32, "d": 16, "l_sel": 64}


def parse() -> tuple[argparse.Namespace, ModelConfig]:
    parser = cli.Parser(prog="demo_64k", description="Prefill a long context in tiles and count what it reads.")
    cli.add_layer_flags(parser, **DEFAULTS, n_sel=8, w=4096)
    parser.add_argument("--S", type=cli.at_least_one, default=65536, help="tokens (%(default)s)")
    parser.add_argument("--prefill_tile", type=cli.at_least_one, default=4096, help="tokens a tile (%(default)s)")
    parser.add_argument("--rope_scale", type=float, default=8.0, help="divides positions (%(default)s)")
    parser.add_argument("--use_fa2", type=int, choices=(0, 1), default=1, help="as NSA_USE_FA2, and wins over it")
    args = parser.parse_args()
    return args, cli.layer_config(parser, args, rope_scale=args.rope_scale)


@torch.inference_mode()
def prefill(cfg: ModelConfig, args: argparse.Namespace, device: torch.device) -> tuple[float, Reads]:
    """Milliseconds that S tokens took, a tile at a time, and the reads that the cache counted."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = NativeSparseAttention(cfg).to(device, dtype)
    cache = KVCache(cfg, args.B, args.S, device=device, dtype=dtype)
    layer = cache.layers[0]

    def step(x: torch.Tensor) -> None:
        attention(x, Rope.of(cfg, layer.length, x.shape[1], device, dtype), layer)

    # The first call of an op loads torch's compiler front end (a second or so), which is no part of a prefill.
    attention(torch.zeros(1, 1, cfg.dim, device=device, dtype=dtype), Rope.of(cfg, 0, 1, device, dtype))
    spent = 0.0
    with measure.Progress("prefill", args.S, "tokens") as progress:
        while layer.length < args.S:
            tile = min(args.prefill_tile, args.S - layer.length)
            x = torch.randn(args.B, tile, cfg.dim, device=device, dtype=dtype)
            spent += measure.time_ms(partial(step, x), device)
            progress.advance(tile)
    return spent, cache.reads()


def summary(args: argparse.Namespace, device: torch.device, ms: float, found: Reads, expected: Reads) -> str:
    """The summary block, as dashboards parse it."""
    peak = measure.peak_memory(device)
    return "\n".join(
        [
            "-- demo_64k summary --",
            f"device: {measure.device_name(device)}",
            f"B={args.B} S={args.S} dim={args.dim} heads={args.heads} G={args.groups} dk={args.dk} dv={args.dv}",
            f"rope_scale={args.rope_scale} prefill_tile={args.prefill_tile} w={args.w} n_sel={args.n_sel}",
            f"prefill_time_ms={ms:.2f} reads_total={found.total}",
            f"reads_cmp={found.cmp} reads_sel={found.sel} reads_win={found.win} reads_expected={expected.total}",
            f"peak_memory_bytes={peak} ({measure.in_gib(peak)})",
        ]
    )


def main() -> int:
    args, cfg = parse()
    routing.override(use_fa2=bool(args.use_fa2))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with measure.memory_errors("demo_64k", "--S, --B or --prefill_tile", device):
        ms, found = prefill(cfg, args, device)
    expected = reads_range(0, args.S, cfg.nsa)
    print(summary(args, device, ms, found, expected))
    if found != expected:
        print(f"demo_64k: measured {found} but expected {expected}, per batch row and group", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
