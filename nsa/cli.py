"""Flags that the scripts share: the shape of one attention layer, and errors of one line that name the flag."""

from __future__ import annotations

import argparse
import re
import sys
from typing import NoReturn

from nsa import routing
from nsa.config import ModelConfig, NSAConfig

# The configuration speaks of `model.n_heads`; whoever typed `--heads` should read `--heads`.
FLAG_OF = {
    "model.dim": "--dim",
    "model.n_heads": "--heads",
    "model.n_kv_groups": "--groups",
    "model.d_k": "--dk",
    "model.d_v": "--dv",
    "model.rope_scale": "--rope_scale",
    "nsa.l": "--l",
    "nsa.d": "--d",
    "nsa.l_sel": "--l_sel",
    "nsa.n_sel": "--n_sel",
    "nsa.w": "--w",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def at_least_one(text: str) -> int:
    """argparse type: an integer of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def add_layer_flags(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """--B --dim --heads --groups --dk --dv --l --d --l_sel --n_sel --w, with the script's defaults."""
    said = {
        "B": "batch rows",
        "dim": "model width",
        "heads": "query heads",
        "groups": "key/value groups (GQA)",
        "dk": "dimension of a key head",
        "dv": "dimension of a value head",
        "l": "compression block, tokens",
        "d": "compression stride, tokens",
        "l_sel": "selection block, tokens",
        "n_sel": "selected blocks a query",
        "w": "sliding window, tokens",
    }
    for name, meaning in said.items():
        parser.add_argument(f"--{name}", type=at_least_one, default=defaults[name], help=f"{meaning} (%(default)s)")


def layer_config(parser: argparse.ArgumentParser, args: argparse.Namespace, rope_scale: float = 1.0) -> ModelConfig:
    """The one-layer model of the flags; numbers that do not fit together, or an NSA_* variable that is not 1 or 0,
    end the script with one line."""
    try:
        routing.flags()
        return ModelConfig(
            dim=args.dim,
            n_layers=1,
            n_heads=args.heads,
            n_kv_groups=args.groups,
            d_k=args.dk,
            d_v=args.dv,
            rope_scale=rope_scale,
            nsa=NSAConfig(l=args.l, d=args.d, l_sel=args.l_sel, n_sel=args.n_sel, w=args.w),
        )
    except ValueError as error:
        parser.error(re.sub(r"(?:model|nsa)\.\w+", lambda name: FLAG_OF.get(name[0], name[0]), str(error)))
