"""Time selected attention, forward and backward, beside dense attention and the plain-torch form, in one run.

Inputs are normal deviates; blocks are the forced ones and others drawn at random, the same number a query. Prints one
CSV row a layout and implementation; the columns vs_dense say how many times faster than the fastest dense form of
the same layout a row is. Needs a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import csv
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa import NSAConfig, cli, measure, selected_attention

DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
HEADER = ("heads", "groups", "dim", "S", "implementation", "fwd_ms", "bwd_ms", "fwd_vs_dense", "bwd_vs_dense", "gib")


def layout(text: str) -> tuple[int, int, int]:
    """argparse type: heads,groups,dim."""
    heads, groups, dim = (cli.at_least_one(part) for part in text.split(","))
    return heads, groups, dim


def random_blocks(S: int, G: int, cfg: NSAConfig) -> torch.Tensor:
    """[1,S,G,N] int32: block 0, the query's own and the one before, the rest at random; -1 where there are too few."""
    lists, step = [], 4096
    M = -(-S // cfg.l_sel)
    for start in range(0, S, step):
        own = (torch.arange(start, min(S, start + step), device="cuda") // cfg.l_sel)[:, None, None]
        block = torch.arange(M, device="cuda")
        score = torch.rand(len(own), G, M, device="cuda")
        score += 2.0 * ((block < cfg.init_blocks) | (block > own - cfg.local_blocks))
        value, chosen = score.masked_fill(block > own, -1.0).topk(min(cfg.n_sel, M), -1)
        chosen = chosen.masked_fill(value < 0, M).sort(-1).values
        lists.append(F.pad(chosen.masked_fill(chosen == M, -1), (0, cfg.n_sel - chosen.shape[-1]), value=-1).int())
    return torch.cat(lists).unsqueeze(0)


def milliseconds(step: Callable[[], object], iters: int) -> float:
    step()
    return statistics.median(measure.time_ms(step, torch.device("cuda")) for _ in range(iters))


def timed(run: Callable[..., torch.Tensor], leaves: list[torch.Tensor], iters: int) -> tuple[float, float, float]:
    """(forward ms, backward ms, GiB above the inputs at the peak of both)."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        forward = milliseconds(lambda: run(*leaves), iters)
    out = run(*leaves)
    grad = torch.randn_like(out)
    backward = milliseconds(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), iters)
    return forward, backward, (torch.cuda.max_memory_allocated() - held) / 2**30


def implementations(
    S: int, H: int, G: int, D: int, dtype: torch.dtype, plain: bool
) -> Iterator[tuple[str, Callable[..., torch.Tensor], list[torch.Tensor]]]:
    cfg = NSAConfig()
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(1, S, heads, D, device="cuda", dtype=dtype, generator=generator)

    leaves = [normal(heads) for heads in (H, G, G)]
    by_head = [x.transpose(1, 2).contiguous().requires_grad_() for x in leaves]
    for name, backend in DENSE.items():

        def dense(*x: torch.Tensor, backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)

        yield f"dense-{name}", dense, by_head
    del by_head
    torch.manual_seed(0)
    blocks = random_blocks(S, G, cfg)
    leaves = [x.requires_grad_() for x in leaves]
    for backend in ("torch", "triton") if plain else ("triton",):
        yield backend, lambda *x, b=backend: selected_attention(*x, blocks, cfg, backend=b), leaves


def main() -> None:
    parser = cli.Parser(prog="bench_selected", description="Time selected attention beside dense attention.")
    parser.add_argument("--S", type=cli.at_least_one, default=65536, help="positions (%(default)s)")
    parser.add_argument("--layouts", type=layout, nargs="+", default=[(64, 4, 128), (32, 8, 128), (12, 2, 64)],
                        metavar="H,G,D", help="heads, groups, head dim (64,4,128 32,8,128 12,2,64)")  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--iters", type=cli.at_least_one, default=5, help="timed calls, of which the median")
    parser.add_argument("--plain", action="store_true", help="also time the plain-torch form")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    print(f"{measure.device_name(torch.device('cuda'))}, torch {torch.__version__}", file=sys.stderr)
    out = csv.writer(sys.stdout)
    out.writerow(HEADER)
    for H, G, D in args.layouts:
        best = [float("inf"), float("inf")]
        for name, run, leaves in implementations(args.S, H, G, D, getattr(torch, args.dtype), args.plain):
            fwd, bwd, gib = timed(run, leaves, args.iters)
            if name.startswith("dense"):
                best = [min(best[0], fwd), min(best[1], bwd)]
            out.writerow((H, G, D, args.S, name, f"{fwd:.3f}", f"{bwd:.3f}",
                          f"{best[0] / fwd:.2f}", f"{best[1] / bwd:.2f}", f"{gib:.2f}"))  # fmt: skip
            sys.stdout.flush()


if __name__ == "__main__":
    main()
