"""Options that several subcommands of the command line share, and what their values may be."""

from __future__ import annotations

import argparse
import math
from typing import Any

from hmt.config import MODES


def positive(text: str) -> int:
    """An option that must be an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative(text: str) -> float:
    """An option that must be a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def add_memory_options(command: argparse.ArgumentParser) -> None:
    memory = command.add_argument_group(
        "memory", "how the text is read; a saved HMT brings its own values, other models use the defaults in brackets"
    )
    memory.add_argument("--mode", choices=MODES, help="hmt: recall the past; rmt: pass one on; baseline: none [hmt]")
    memory.add_argument("--segment-length", type=positive, metavar="L", help="tokens read at a time [512]")
    memory.add_argument("--num-sensory", type=int, metavar="K", help="tokens of the last segment read again [32]")
    memory.add_argument("--queue-size", type=positive, metavar="N", help="past segments that can be recalled [300]")
    memory.add_argument("--causal", action="store_true", help="recall by the previous segment: sees no later token")


def memory_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `HMTConfig` that the memory options ask for."""
    names = ("mode", "segment_length", "num_sensory", "queue_size")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.causal:
        settings["summary_source"] = "previous"
    return settings
