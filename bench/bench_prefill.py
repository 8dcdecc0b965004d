"""Time a long prefill of a whole model through its cache, tile by tile, up to the logits of the last token.

The default is the 125M shape at 16,384 tokens, whose budget on two CPU cores is 4 GB and 2 minutes. The figures are a
record, not a test: the exit code does not depend on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
from functools import partial

import torch

from nsa import cli, measure
from nsa.blocks import reads_range
from nsa.cache import KVCache
from nsa.config import ModelConfig
from nsa.model import Transformer
from nsa.train.config import ConfigError, load

BUDGET_S, BUDGET_BYTES = 120, 4 * 10**9
CONFIG_125M = Path(__file__).resolve().parents[1] / "configs" / "m7c_125m.yaml"


@torch.inference_mode()
def prefill(cfg: ModelConfig, S: int, tile: int, device: torch.device) -> dict[str, object]:
    """Figures of one prefill of S random tokens (batch 1) by a freshly initialised model."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Transformer(cfg).to(device, dtype)
    cache = KVCache(cfg, 1, S, device=device, dtype=dtype)
    ids = torch.randint(cfg.vocab_size, (1, S), device=device)
    model(ids[:, :1])  # the first call of an op loads torch's compiler front end, which is no part of a prefill
    ms = 0.0
    with measure.Progress("prefill", S, "tokens") as progress:
        for part in ids.split(tile, dim=1):
            ms += measure.time_ms(partial(model, part, cache, last_only=True), device)
            progress.advance(part.shape[1])
    peak = measure.peak_memory(device)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": measure.device_name(device),
        "dtype": str(dtype),
        "S": S,
        "prefill_tile": tile,
        "seconds": round(ms / 1e3, 3),
        "tokens_per_s": round(S / ms * 1e3, 1),
        "peak_memory_bytes": peak,
        "reads_actual": cache.reads().total,
        "reads_expected": reads_range(0, S, cfg.nsa).total,
        "within_budget": ms / 1e3 <= BUDGET_S and peak <= BUDGET_BYTES,
    }


def main() -> int:
    parser = cli.Parser(prog="bench_prefill", description="Time and peak memory of a model's long prefill.")
    parser.add_argument("--config", type=Path, default=CONFIG_125M, help="a training configuration")
    parser.add_argument("--S", type=cli.at_least_one, default=16384, help="tokens (%(default)s)")
    parser.add_argument("--prefill_tile", type=cli.at_least_one, default=2048, help="tokens a tile (%(default)s)")
    args = parser.parse_args()
    try:
        cfg = load(args.config).model
    except ConfigError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with measure.memory_errors("bench_prefill", "--S or --prefill_tile", device):
        figures = prefill(cfg, args.S, args.prefill_tile, device)
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(json.dumps({"bench": "prefill", **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
