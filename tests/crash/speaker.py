"""A process that speaks a few turns with one agent and says of each how it went: python -m tests.crash.speaker HOME TURNS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.runtime.agents import memory, open_runtime, turn


def said(n: int) -> str:
    return f"line {n}: the keeper writes down what the tide brought in, and what it took " * (1 + n % 3)


def main() -> None:
    home, turns = Path(sys.argv[1]), int(sys.argv[2])
    runtime = open_runtime(home, disk_floor=0)
    known = runtime.agents()
    first = known[0]["turns"] if known else 0
    print("speaking", flush=True)
    for n in range(first, first + turns):
        finished = turn(runtime, "ada", said(n))
        disk = runtime.store()["disk"]
        line = {"n": n, "text": finished.text, "committed": memory(finished)["committed"]}
        print(json.dumps(line | {k: disk[k] for k in ("read_only", "disk_full")}), flush=True)
    runtime.close()


if __name__ == "__main__":
    main()
