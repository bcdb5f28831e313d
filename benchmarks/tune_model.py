"""Which settings of the model layer are best on this machine: python -m benchmarks.tune_model.

Every setting has a process of its own, and all run once per round, one after the other, so that a busy machine slows
them alike; a ratio is the median over rounds of a setting's time over the default's in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from benchmarks import results
from benchmarks.model_providers import OURS, started, when_ready
from benchmarks.model_rounds import named
from benchmarks.model_shape import SEGMENTS
from benchmarks.sizes import DEVICE

ROUNDS = 5
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "read": [{}, *({"summary_batch_size": size} for size in (1, 2, 4)), {"attn_implementation": "sdpa"}],
    "score": [{}, *({"loss_chunk_size": size} for size in (64, 128, 256, 512, 1024))],
}


def measure(workload: str) -> list[results.Row]:
    """A row of time and one of extra peak memory, that of the first round, per setting."""
    rounds: list[list[Any]] = [[] for _ in SETTINGS[workload]]
    with contextlib.ExitStack() as processes:
        runs = when_ready([processes.enter_context(started(OURS, **setting)) for setting in SETTINGS[workload]])
        for _ in range(1 + ROUNDS):
            for run, measured in zip(runs, rounds, strict=True):
                measured.append(run(workload, SEGMENTS))
    seconds = [[measured.seconds for measured in of[1:]] for of in rounds]
    rows = []
    for setting, times, of in zip(SETTINGS[workload], seconds, rounds, strict=True):
        name = ", ".join(f"{key}={value}" for key, value in setting.items()) or "default"
        add = results.row
        ratio = results.median_ratio(times, seconds[0])
        rows.append(add("model settings", named(workload), "time", name, times, "s", ratio=ratio, ratio_to="default"))
        extra = [of[0].extra_peak / 2**20]
        rows.append(add("model settings", named(workload), "extra peak memory", name, extra, "MiB"))
    return rows


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.tune_model", description=__doc__).parse_args()
    rows = [row for workload in SETTINGS for row in measure(workload)]
    results.write(f"model_settings_{DEVICE}", rows)
    print(*results.table(rows), sep="\n")


if __name__ == "__main__":
    main()
