"""Where the time of a segment goes: the recurrence's own ranges, measured by torch.profiler."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from hmt.model import HMTForCausalLM
from hmt.state_file import check_folder, replacing

WHOLE = "hmt.pass"
PARTS = ("summary", "recall", "main", "head", "loss")


@dataclass
class Profile:
    """Seconds of a pass over some segments by part; "other" is what no part accounts for, and `total` all of it.

    Attributes:
        seconds: by part, exclusive of each other.
        total: the whole pass while it was profiled.
        unprofiled: the same pass without the profiler, which slows small models down.
        num_segments, num_tokens: what was read.
    """

    seconds: dict[str, float]
    total: float
    unprofiled: float
    num_segments: int
    num_tokens: int

    def table(self) -> list[str]:
        """Lines of an aligned table: part, milliseconds per segment, share of the pass."""
        lines = [f"{'part':10}{'ms/segment':>12}{'share':>8}"]
        for part, seconds in [*self.seconds.items(), ("total", self.total)]:
            lines.append(f"{part:10}{1e3 * seconds / self.num_segments:>12.2f}{seconds / self.total:>8.1%}")
        return lines


@torch.no_grad()
def profile_pass(model: HMTForCausalLM, input_ids: Tensor, trace: str | Path | None = None) -> Profile:
    """Score ids [1, T] once to warm up, once for its time and once under the profiler; write a chrome trace to `trace`.

    On CUDA the parts are times of the GPU, elsewhere of the CPU.

    Raises:
        ValueError: a trace in a folder that is not there, before anything is read.
    """
    if trace is not None:
        check_folder(trace)
    cuda = input_ids.is_cuda

    def score() -> float:
        start = time.perf_counter()
        with record_function(WHOLE):
            model(input_ids, labels=input_ids)
        if cuda:
            torch.cuda.synchronize(input_ids.device)
        return time.perf_counter() - start

    score()
    unprofiled = score()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        score()
    averages = {event.key: event for event in profiler.key_averages()}

    def seconds(name: str) -> float:
        event = averages.get(name)
        return 0.0 if event is None else (event.device_time_total if cuda else event.cpu_time_total) / 1e6

    parts = {part: seconds(f"hmt.{part}") for part in PARTS}
    parts["loss"] = max(0.0, parts["loss"] - parts["head"])  # the head runs inside the loss, chunk by chunk
    total = seconds(WHOLE)
    parts["other"] = max(0.0, total - sum(parts.values()))
    if trace is not None:
        with replacing(Path(trace)) as partial:  # the profiler writes nothing, and says nothing, where it cannot
            profiler.export_chrome_trace(str(partial))
    num_segments = -(-input_ids.shape[1] // model.config.segment_length)
    return Profile(parts, total, unprofiled, num_segments, input_ids.shape[1])
