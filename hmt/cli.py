"""The command line: hmt score, read, generate and profile FILE, hmt train and evaluate DATA, hmt info."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from hmt.cli_evaluate import add_evaluate
from hmt.cli_text import add_text_commands
from hmt.cli_train import add_train
from hmt.loading import load


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `hmt` command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # who read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing it would fail once more
        return 1
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        print(f"hmt: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhmt: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hmt",
        description="Read texts of any length with a causal language model and hierarchical memory.",
        epilog='Example: hmt score book.txt --model HuggingFaceTB/SmolLM2-135M. "hmt COMMAND --help" says more.',
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add_text_commands(commands)
    add_train(commands)
    add_evaluate(commands)

    command = commands.add_parser(
        "info",
        help="versions, devices and usable kernels; with --model also that model's settings",
        description="Print versions, devices and, for each operator, which implementations are usable or why not.",
    )
    command.add_argument("--model", help="directory or hub name of a model to describe as well")
    command.set_defaults(run=_info)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    from hmt_kernels.info import main as kernels_info

    kernels_info()
    if arguments.model:
        model = load(arguments.model, device="cpu").model
        print(f"\n{arguments.model}")
        for name, value in model.config.to_dict().items():
            if name in ("mode", "segment_length", "num_sensory", "queue_size", "summary_fraction", "summary_source"):
                print(f"  {name:18}{value}")
        attention = model.backbone.config._attn_implementation
        total = sum(p.numel() for p in model.parameters())
        own = total - sum(p.numel() for p in model.backbone.parameters())
        print(f"  {'backbone':18}{type(model.backbone).__name__}, attention {attention!r}")
        print(f"  {'parameters':18}{total:,}, of these memory {own:,} ({100 * own / total:.2f} %)")
    return 0
