"""Train as a YAML config says: CONFIG=configs/train_showcase.yaml python scripts/train_showcase.py [flags]."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os

EPILOG = """Every other setting is a key of the config: --set train.lr=1e-3.
Exit: 0 done; 1 the loss stopped being finite, the data broke off, or the disk is full; 2 a setting, the
data or a checkpoint cannot be used; 143 and 130 after SIGTERM and Ctrl-C, with a checkpoint to --resume from."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--dataset", choices=["synthetic", "text", "fineweb_edu", "fineweb_edu_local"])
    parser.add_argument("--local-path", metavar="PATH", help="file, folder or glob to train on")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--batch-size", type=int, help="windows in a micro-batch, over all ranks")
    parser.add_argument("--accum-batches", type=int, help="micro-batches in an optimizer step")
    parser.add_argument("--ddp", type=int, choices=[-1, 0, 1], help="-1: if torchrun started several processes")
    parser.add_argument("--resume", metavar="PATH", help="a checkpoint, or a run's out_dir for its newest")
    parser.add_argument("--save", metavar="PATH", help="write the last checkpoint to this file too")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="assignments")
    return parser.parse_args(argv)


FLAGS = {
    "dataset": "data.dataset",
    "local_path": "data.path",
    "steps": "train.steps",
    "seq_len": "train.seq_len",
    "batch_size": "train.batch_size",
    "accum_batches": "train.accumulate_grad_batches",
    "ddp": "runtime.ddp",
    "resume": "train.resume",
    "save": "train.save",
}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    from nsa.train import config, dist
    from nsa.train.errors import TrainError
    from nsa.train.loop import train

    try:
        overrides = [config.parse_set(assignment) for assignment in arguments.assignments]
        for name, key in FLAGS.items():
            if (value := getattr(arguments, name)) is not None:
                overrides.append(config.Override("--" + name.replace("_", "-"), key, value))
        result = train(config.load(os.environ.get("CONFIG", "configs/train_showcase.yaml"), overrides), emit=emit)
    except TrainError as error:
        if dist.rank() == 0:
            print(f"train_showcase: {error}", file=sys.stderr)
        return error.exit_code
    return 128 + result.signum if result.signum else 0


def emit(line: str) -> None:
    print(line, flush=True)  # a log that is redirected is read while the run goes on


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
