"""Time one decode step of an NSA layer against context length, beside ordinary full attention in the same run.

Row S: the cache holds S-1 tokens and the S-th is decoded; every iteration takes it back. NSA, its branches and dense
attention take turns, so that a machine that slows down slows them alike. Prints a table and, last, a line of JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F

from nsa import cli, measure
from nsa.attention import NativeSparseAttention
from nsa.blocks import n_compressed, reads, reads_range
from nsa.cache import KVCache
from nsa.config import ModelConfig
from nsa.ops.compressed import compressed_attention
from nsa.ops.selected import selected_attention
from nsa.ops.selection import select_blocks
from nsa.ops.window import sliding_window_attention
from nsa.records import CsvLog, DecodeRow, table
from nsa.rope import Rope

DEFAULTS = {"B": 1, "dim": 256, "heads": 8, "groups": 2, "dk": 32, "dv": 32, "l": 32, "d": 16, "l_sel": 64}
PREFILL_TILE = 1024


def lengths(text: str) -> list[int]:
    """argparse type: context lengths, comma-separated; ascending, since one cache grows through them."""
    return sorted({cli.at_least_one(part) for part in text.split(",")})


def parse() -> tuple[argparse.Namespace, ModelConfig, CsvLog | None]:
    parser = cli.Parser(prog="bench_decode", description="Time one decode step against context length.")
    cli.add_layer_flags(parser, **DEFAULTS, n_sel=16, w=512)
    parser.add_argument("--S_list", type=lengths, default="128,256,512,1024", help="context lengths (%(default)s)")
    parser.add_argument("--iters", type=cli.at_least_one, default=32, help="timed steps a length (%(default)s)")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them (%(default)s)")
    parser.add_argument("--csv", type=Path, help="also write the rows to this CSV file")
    args = parser.parse_args()
    if args.warmup < 0:
        parser.error(f"argument --warmup: {args.warmup} is below 0")
    cfg = cli.layer_config(parser, args)
    try:
        log = CsvLog(args.csv, DecodeRow) if args.csv else None
    except OSError as error:
        parser.error(f"argument --csv: cannot write {args.csv} ({error.strerror}); name another file")
    return args, cfg, log


class Dense:
    """One decode step of ordinary full attention over S keys: q, k, v and o projections of the layer's own shapes."""

    def __init__(self, cfg: ModelConfig, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        self.cfg = cfg
        H, G = cfg.n_heads, cfg.n_kv_groups
        sizes = {"q": (cfg.dim, H * cfg.d_k), "k": (cfg.dim, G * cfg.d_k), "v": (cfg.dim, G * cfg.d_v)}
        sizes["o"] = (H * cfg.d_v, cfg.dim)
        self.project = torch.nn.ModuleDict({name: torch.nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.project.to(device, dtype)
        self.device, self.dtype = device, dtype
        self.k = torch.randn(batch, G, max_len, cfg.d_k, device=device, dtype=dtype)
        self.v = torch.randn(batch, G, max_len, cfg.d_v, device=device, dtype=dtype)

    def step(self, x: torch.Tensor, S: int) -> torch.Tensor:
        """x [B,1,dim], the token at position S-1 -> [B,1,dim]."""
        cfg, p = self.cfg, self.project
        rope = Rope.of(cfg, S - 1, 1, self.device, self.dtype)
        q = rope.tokens(p["q"](x).unflatten(-1, (cfg.n_heads, cfg.d_k)))
        k = rope.tokens(p["k"](x).unflatten(-1, (cfg.n_kv_groups, cfg.d_k)))
        self.k[:, :, S - 1], self.v[:, :, S - 1] = k[:, 0], p["v"](x).unflatten(-1, (cfg.n_kv_groups, cfg.d_v))[:, 0]
        # With one query and nothing masked, the heads of a group can stand as its rows: no key is read twice.
        rows = q[:, 0].unflatten(1, (cfg.n_kv_groups, -1))  # [B,G,R,Dk]
        out = F.scaled_dot_product_attention(rows, self.k[:, :, :S], self.v[:, :, :S])
        return p["o"](out.flatten(1)).unsqueeze(1)


class Sparse:
    """The NSA layer with its cache, grown from one context length to the next."""

    def __init__(self, cfg: ModelConfig, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        self.cfg, self.batch, self.device, self.dtype = cfg, batch, device, dtype
        self.attention = NativeSparseAttention(cfg).to(device, dtype)
        self.cache = KVCache(cfg, batch, max_len, device=device, dtype=dtype)
        self.prefill_reads = 0

    def tokens(self, T: int) -> torch.Tensor:
        """Random inputs [B,T,dim]."""
        return torch.randn(self.batch, T, self.cfg.dim, device=self.device, dtype=self.dtype)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """Feed x [B,T,dim] after what the cache holds -> [B,T,dim]."""
        return self.attention(x, self.cache.rope(x.shape[1], x), self.cache.layers[0])

    def grow(self, length: int) -> None:
        """Prefill up to `length` positions, by tiles."""
        self.cache.reset_reads()
        while self.cache.length < length:
            self.step(self.tokens(min(PREFILL_TILE, length - self.cache.length)))
        self.prefill_reads += self.cache.reads().total

    def counted_step(self, x: torch.Tensor) -> int:
        """Tokens that one step reads; the cache is left as it was."""
        self.cache.reset_reads()
        self.step(x)
        self.cache.rewind(1)
        return self.cache.reads().total

    def branches(self, x: torch.Tensor) -> dict[str, Callable[[], object]]:
        """Each branch alone, on the inputs that the step of x hands it; choosing blocks belongs to `sel`."""
        layer, nsa, S = self.cache.layers[0], self.cfg.nsa, self.cache.length + 1
        self.step(x)
        rope = Rope.of(self.cfg, S - 1, 1, self.device, self.dtype)
        q = rope.tokens(self.attention.q_proj(x).unflatten(-1, (self.cfg.n_heads, self.cfg.d_k)))
        gate = self.attention.gate_proj(x).view(self.batch, 1, -1, 3).sigmoid()[..., :1].to(q.dtype)
        C, recent = n_compressed(S, nsa), slice(max(layer.win.end - nsa.w, 0), layer.win.end)
        k_cmp, v_cmp = layer.cmp.k[:, :C], layer.cmp.v[:, :C]
        k_sel, v_sel = layer.sel.k[:, :S], layer.sel.v[:, :S]
        k_win, v_win = layer.win.buffer.k[:, recent], layer.win.buffer.v[:, recent]
        _, lse = compressed_attention(q, k_cmp, v_cmp, nsa, seq_len=S)
        self.cache.rewind(1)

        def sel() -> torch.Tensor:
            blocks = select_blocks(q, k_cmp, lse, nsa, seq_len=S)
            return selected_attention(q, k_sel, v_sel, blocks, nsa, seq_len=S) * gate

        return {
            "cmp": lambda: compressed_attention(q, k_cmp, v_cmp, nsa, seq_len=S)[0] * gate,
            "sel": sel,
            "win": lambda: sliding_window_attention(q, k_win, v_win, nsa, seq_len=S) * gate,
        }


def medians(
    steps: dict[str, Callable[[], object]], restore: Callable[[], None], args: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Median ms of each step over `iters` rounds, in which all take turns; `restore` runs untimed after `total`."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.warmup + args.iters):
        for name, step in steps.items():
            times[name].append(measure.time_ms(step, device))
            if name == "total":
                restore()
    return {name: statistics.median(values[args.warmup :]) for name, values in times.items()}


def measure_row(S: int, sparse: Sparse, dense: Dense, args: argparse.Namespace) -> DecodeRow:
    """Grow the cache to S-1 and time the S-th token."""
    cfg = sparse.cfg
    sparse.grow(S - 1)
    x = sparse.tokens(1)
    decode_reads = sparse.counted_step(x)
    steps = {"total": lambda: sparse.step(x), "dense": lambda: dense.step(x, S), **sparse.branches(x)}
    ms = medians(steps, lambda: sparse.cache.rewind(1), args, sparse.device)
    return DecodeRow(
        S=S,
        ms_total=ms["total"],
        ms_cmp=ms["cmp"],
        ms_sel=ms["sel"],
        ms_win=ms["win"],
        reads_actual=sparse.prefill_reads + decode_reads,
        reads_expected=reads_range(0, S, cfg.nsa).total,
        reads_actual_decode=decode_reads,
        reads_expected_decode=reads(S, cfg.nsa).total,
        ms_dense=ms["dense"],
        speedup=ms["dense"] / ms["total"],
        bytes_per_token=decode_reads * cfg.n_kv_groups * (cfg.d_k + cfg.d_v) * dense.k.element_size(),
    )


def render(rows: list[DecodeRow]) -> str:
    """The rows as a table for people."""
    columns = ["S", "ms_total", "cmp", "sel", "win", "dense", "speedup", "reads", "exp"]
    cells = []
    for row in rows:
        times = (row.ms_total, row.ms_cmp, row.ms_sel, row.ms_win, row.ms_dense, row.speedup)
        counts = (row.reads_actual_decode, row.reads_expected_decode)
        cells.append([str(row.S), *(f"{ms:.3f}" for ms in times), *map(str, counts)])
    return table(columns, cells)


@torch.inference_mode()
def measure_all(
    args: argparse.Namespace, cfg: ModelConfig, device: torch.device, dtype: torch.dtype, log: CsvLog | None
) -> list[DecodeRow]:
    """A row for every length, each written to the log as soon as it is measured."""
    torch.manual_seed(0)
    sparse = Sparse(cfg, args.B, max(args.S_list), device, dtype)
    dense = Dense(cfg, args.B, max(args.S_list), device, dtype)
    rows = []
    with measure.Progress("decode", len(args.S_list), "lengths") as progress:
        for S in args.S_list:
            rows.append(measure_row(S, sparse, dense, args))
            if log:
                log.write(rows[-1])
            progress.advance(1)
    return rows


def main() -> int:
    args, cfg, log = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with measure.memory_errors("bench_decode", "--S_list or --B", device):
        rows = measure_all(args, cfg, device, dtype, log)
    print(render(rows))
    print(json.dumps({"bench": "decode", **setting(args, device, dtype), "rows": [asdict(row) for row in rows]}))
    wrong = [row.S for row in rows if row.reads_actual != row.reads_expected]
    if wrong:
        print(f"bench_decode: measured reads differ from the expected ones at S = {wrong}", file=sys.stderr)
    return 1 if wrong else 0


def setting(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """What a figure needs beside it to mean something."""
    given = {name: value for name, value in vars(args).items() if name not in ("S_list", "csv")}
    return {"device": measure.device_name(device), "dtype": str(dtype), "torch": torch.__version__, **given}


if __name__ == "__main__":
    sys.exit(main())
