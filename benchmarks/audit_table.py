"""The table of the audit: what a kernel uses, how long it should take by that and, on a GPU, how long it takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import results, stopwatch
from benchmarks.audit_cases import Case
from benchmarks.cards import CARDS, MOST_WARPS, WARP, blocks_per_multiprocessor, predicted
from benchmarks.sass import Code
from hmt_kernels import triton_launch

COLUMNS = (
    "kernel", "arch", "warps", "registers", "spills", "shared_kib", "blocks_per_sm", "occupancy", "loop_instructions",
    "instructions_per_element", "bytes", "flops", "bound", "predicted_us", "measured_us", "measured_over_predicted",
    "card", "device", "commit", "date",
)  # fmt: skip
ROUNDS = 5


class Compiled(NamedTuple):
    label: str
    arch: str  # sm_90
    warps: int | None  # None: chosen by the CUDA kernel's launcher
    code: Code
    shared_memory: int


def table_row(compiled: Compiled, case: Case | None) -> results.Row:
    """What is known without running it; of a CUDA C++ kernel, whose launcher chooses the rest, its code only."""
    code = compiled.code
    row = {
        "kernel": compiled.label,
        "arch": compiled.arch,
        "registers": str(code.registers),
        "spills": str(code.spills),
        "shared_kib": f"{compiled.shared_memory / 1024:.1f}",
        "loop_instructions": str(code.loop_length),
    }
    if compiled.warps is None or case is None:
        return row
    card = CARDS[case.target.arch]
    blocks = blocks_per_multiprocessor(card, compiled.warps, code.registers, compiled.shared_memory)
    per_element = code.loop_length * compiled.warps * WARP / case.elements_per_turn
    seconds, bound = predicted(card, case.cost, case.element_size, per_element * case.elements)
    return row | {
        "warps": str(compiled.warps),
        "blocks_per_sm": str(blocks),
        "occupancy": f"{blocks * compiled.warps / MOST_WARPS:.2f}",
        "instructions_per_element": f"{per_element:.3g}",
        "bytes": f"{case.cost.bytes:.4g}",
        "flops": f"{case.cost.flops:.4g}",
        "bound": bound,
        "predicted_us": f"{1e6 * seconds:.4g}",
        "card": card.name,
    }


def seconds_of(case: Case, rounds: int = ROUNDS) -> float:
    """The fastest of some turns of a launch, replayed as a CUDA graph on a GPU; its tensors must lie on a device."""
    tensors = [value for value in case.launch.arguments.values() if isinstance(value, torch.Tensor)]
    for value in filter(torch.is_floating_point, tensors):
        value.normal_()  # products of zeros take less power, and so less time
    device = tensors[0].device
    call = stopwatch.as_graph(lambda: triton_launch.run(case.launch, device))
    runs = stopwatch.runs_per_turn(stopwatch.seconds_of(call))
    return min(stopwatch.turn(call, runs) for _ in range(rounds))


def with_measurements(rows: Iterable[results.Row], seconds: dict[tuple[str, str], float]) -> list[results.Row]:
    """Rows of the table with the times of those that were measured, by kernel and architecture."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    filled = []
    for row in rows:
        key = row["kernel"], row["arch"]
        if key in seconds and row.get("predicted_us"):
            measured = 1e6 * seconds[key]
            share = measured / float(row["predicted_us"])
            row = row | {
                "measured_us": f"{measured:.4g}", "measured_over_predicted": f"{share:.3g}", "device": device
            }  # fmt: skip
        filled.append(row)
    return filled


def write(path: Path, rows: Iterable[results.Row]) -> None:
    where = results.provenance()
    results.write_csv(path, COLUMNS, [{"commit": where["commit"], "date": where["date"]} | row for row in rows])
