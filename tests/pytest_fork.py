"""pytest in forks of one process that holds torch already: a second each where a fresh start takes six.

Reads a job a line on stdin, {"root": folder, "tests": [id, ...], "log": file}; runs the tests of the package in that
folder; answers with pytest's exit code on a line of its own, 124 for a run that took too long.
"""

import json
import os
import signal
import sys

import pytest
import torch._dynamo

LIMIT_S = 240


def _child(job: dict) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["root"])
    sys.path.insert(0, job["root"])
    signal.alarm(LIMIT_S)
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *job["tests"]])
    sys.stdout.flush()
    os._exit(int(code))


def main() -> None:
    torch.set_num_threads(1)  # a fork inherits no threads
    for line in sys.stdin:
        if "nsa" in sys.modules:
            raise RuntimeError("this process must not hold the package whose copies its forks test")
        child = os.fork()
        if child == 0:
            _child(json.loads(line))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(124 if code == -signal.SIGALRM else code, flush=True)


if __name__ == "__main__":
    main()
