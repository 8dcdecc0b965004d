"""Print, as JSON, what this machine has and which backend every op would take, with the reasons against the others."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

from nsa import routing


def main() -> int:
    try:
        routing.flags()
    except ValueError as error:
        print(f"print_routing: {error}", file=sys.stderr)
        return 2
    print(json.dumps(routing.snapshot(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
