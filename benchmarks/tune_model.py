"""Which settings of the model layer are best on this machine: python -m benchmarks.tune_model.

All settings run once per round, one after the other, so that a busy machine slows them alike; a ratio is the median
over rounds of a setting's time over the default's in the same round. Peak memory is measured in a process per setting.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch

from benchmarks import THREADS, peak_memory, results
from benchmarks.model_providers import OURS, runners
from benchmarks.model_shape import text

ROUNDS = 5
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "read": [{}, *({"summary_batch_size": size} for size in (1, 2, 4, 8)), {"attn_implementation": "sdpa"}],
    "score": [{}, *({"loss_chunk_size": size} for size in (64, 128, 256, 512, 1024))],
}


@torch.no_grad()
def measure_times(workload: str) -> list[list[float]]:
    """Seconds per setting and round."""
    runs = [runners(OURS, **setting)[workload] for setting in SETTINGS[workload]]
    ids = text()
    for run in runs:
        run(ids[:, :64])
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run(ids)
            times.append(time.perf_counter() - start)
    return seconds


def measure(workload: str) -> list[dict[str, object]]:
    """A row of time and one of extra peak memory per setting."""
    rows: list[dict[str, object]] = []
    seconds = measure_times(workload)
    for setting, times in zip(SETTINGS[workload], seconds, strict=True):
        name = ", ".join(f"{key}={value}" for key, value in setting.items()) or "default"
        ratio = statistics.median(a / b for a, b in zip(times, seconds[0], strict=True))
        mebibytes = peak_memory.in_new_process(OURS, workload, json.dumps(setting)) / 2**20
        row = {"benchmark": "model settings", "workload": workload, "comparison": "", "provider": name}
        spread = {"min": f"{min(times):.4g}", "max": f"{max(times):.4g}"}
        value = f"{statistics.median(times):.4g}"
        rows.append({**row, "metric": "time", "value": value, **spread, "unit": "s", "ratio": f"{ratio:.3f}"})
        rows.append({**row, "metric": "extra peak memory", "value": f"{mebibytes:.4g}", "unit": "MiB"})
    return rows


def main() -> None:
    torch.set_num_threads(THREADS)
    rows = [row for workload in SETTINGS for row in measure(workload)]
    results.write("model_settings_cpu", rows)
    print(*results.table(rows), sep="\n")


if __name__ == "__main__":
    main()
