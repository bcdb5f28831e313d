"""Reading, scoring, training and decoding on a GPU, by turns in one process: two shapes, with CUDA graphs and without.

The suites "model" and "training" give every provider a process of its own; that takes longer than a GPU is lent for.
The memories of every text that is timed must be ours, as there. A first round, which captures graphs, does not count.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks import costs, providers
from benchmarks.model_providers import CHECKPOINTED, GRAPHS, NO_GRAPHS, PEER, PLAIN
from benchmarks.model_rounds import check
from benchmarks.model_shape import CONFIG, DTYPE, LLAMA_7B, NUM_SENSORY, build, weight_bytes
from benchmarks.processes import held_memory, peak_memory
from benchmarks.results import Row, median_ratio, row
from benchmarks.roofline import ceilings
from benchmarks.sizes import DEVICE, TINY, size

ROUNDS = size(2, tiny=2)
PROMPT, TOKENS = size(40, tiny=3), size(32, tiny=4)  # of the open segment, and generated
# by shape: its config, the segment's length, and how many times HMT-pytorch's speed
SHAPES = {"SmolLM-135M": (CONFIG, size(512, tiny=16), 10.0), "Llama-7B": (LLAMA_7B, size(1024, tiny=16), 2.5)}
TRAIN_GOAL, TRAIN_MEMORY_GOAL = 3.0, 4.0
# (shape, what, segments); seven billion parameters leave no room for several models' gradients. Training comes first:
# the memory that it takes is counted, before graphs of other passes hold any
WORKLOADS = [("SmolLM-135M", "train", 4), ("SmolLM-135M", "read", 4), ("SmolLM-135M", "read", 16)]
WORKLOADS += [("SmolLM-135M", "score", 4), ("Llama-7B", "read", 4)]

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not TINY, reason="it is for a GPU")


@functools.cache
def runners(shape: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What every provider reads, scores and trains with; and who cannot, with the reason."""
    runners.cache_clear()  # the models of one shape at a time
    config, length, _ = SHAPES[shape]
    found, absent = {}, {}
    trains = (shape, "train") in {workload[:2] for workload in WORKLOADS}
    for name in (GRAPHS, *([CHECKPOINTED] if trains else []), NO_GRAPHS, PLAIN, PEER):
        provider = providers.get("model", name)
        reason = provider.missing()
        if reason is not None and not (TINY and name in (GRAPHS, CHECKPOINTED, NO_GRAPHS)):
            absent[name] = reason
        else:
            found[name] = provider.make(shape=config, segment_length=length)
    return found, absent


def text(shape: str, segments: int) -> torch.Tensor:
    config, length, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (1, segments * length), generator=generator).to(DEVICE)


def named(what: str, shape: str, segments: int) -> str:
    return f"{what} {shape} segments={segments} L={SHAPES[shape][1]}"


def timed(call: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Clock(BaseStreamer):
    """When each piece came out of generate(): the prompt, then the tokens, which are on the host by then."""

    def __init__(self) -> None:
        self.came: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.came.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds_per_token(self) -> list[float]:
        """From the second token on: the first one waits for the prompt."""
        return [later - earlier for earlier, later in itertools.pairwise(self.came[1:])]


@pytest.mark.parametrize(("shape", "what", "segments"), WORKLOADS)
def test_model(shape: str, what: str, segments: int, benchmark: Any, rows: list[Row], absent: dict[str, str]) -> None:
    found, missing = runners(shape)
    found = {name: of for name, of in found.items() if what == "train" or name != CHECKPOINTED}
    absent.update(missing)
    ids, seconds = text(shape, segments), {name: [] for name in found}
    results, peaks = {}, {}
    with torch.set_grad_enabled(what == "train"):
        for name, of in found.items():
            held = held_memory()
            results[name] = {key: value.detach().float().cpu().numpy() for key, value in of[what](ids).items()}
            peaks[name] = max(peak_memory() - held, 1)
        for name, result in results.items():
            check(name, result, results[GRAPHS])

        def turn() -> None:
            for name, of in found.items():
                seconds[name].append(timed(functools.partial(of[what], ids)))

        benchmark.pedantic(turn, rounds=ROUNDS)
    config, length, read_goal = SHAPES[shape]
    goal = TRAIN_GOAL if what == "train" else read_goal
    cost = costs.model(what, config, segments, length, NUM_SENSORY, weight_bytes(config))
    for name, values in seconds.items():
        of_ours: dict[str, Any] = {
            "cost": cost,
            "ceilings": ceilings(DTYPE),
            "ratio": median_ratio(values, seconds[GRAPHS]),
            "ratio_to": GRAPHS,
        }
        of_ours["goal"] = f">= {goal:g}" if name == PEER else ""
        rows.append(row("model on a GPU", named(what, shape, segments), "time", name, values, "ms", **of_ours))
    for name, peak in peaks.items() if what == "train" else ():
        of_ours = {"ratio": peak / peaks[GRAPHS], "ratio_to": GRAPHS}
        of_ours["goal"] = f">= {TRAIN_MEMORY_GOAL:g}" if name == PEER else ""
        workload = named(what, shape, segments)
        rows.append(row("model on a GPU", workload, "extra peak memory", name, [peak / 2**20], "MiB", **of_ours))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_decoding(shape: str, benchmark: Any, rows: list[Row]) -> None:
    """Between two tokens of generate(), after a text of one segment and a little."""
    runners.cache_clear()
    config, length, _ = SHAPES[shape]
    ids = text(shape, 2)[:, : length + PROMPT]
    names, seconds, tokens = {GRAPHS: True, NO_GRAPHS: False}, {}, {}
    for name, on in names.items():
        model = build(shape=config, segment_length=length, cuda_graphs=on)

        def generate(clock: Clock, model: Any = model) -> torch.Tensor:
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            return model.generate(ids, max_new_tokens=1 + TOKENS, streamer=clock, **options)

        tokens[name] = generate(Clock())
        clocks = [Clock() for _ in range(ROUNDS)]
        for clock in clocks:
            generate(clock)
        seconds[name] = [value for clock in clocks for value in clock.seconds_per_token()]
        del model
    # in bfloat16 the two may part after a tie; the first tokens come from the same numbers
    assert torch.equal(*(ids_of[:, : length + PROMPT + 2] for ids_of in tokens.values()))
    assert all(len(values) == ROUNDS * TOKENS for values in seconds.values())
    benchmark.pedantic(lambda: None, rounds=1)
    for name, values in seconds.items():
        ratio = statistics.median(values) / statistics.median(seconds[GRAPHS])
        workload = f"decode {shape} L={length}"
        rows.append(row("model on a GPU", workload, "time per token", name, values, "ms", ratio=ratio, ratio_to=GRAPHS))
