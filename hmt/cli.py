"""The command line: hmt score, generate and profile FILE, hmt train and evaluate DATA, hmt info."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

from hmt.cli_evaluate import add_evaluate
from hmt.cli_train import add_train, non_negative, positive
from hmt.config import MODES
from hmt.loading import Loaded, encode_file, load
from hmt.profiling import profile_pass
from hmt.scoring import Score, peak_memory_bytes, score
from hmt.state import HMTState

UNTRAINED = (
    "Note: the memory of this model is untrained (fresh random parameters around an existing language model).\n"
    "It reads any length at constant memory, but what it recalls carries no information yet: expect a perplexity\n"
    "above the bare model's."
)


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

    command = commands.add_parser(
        "score",
        help="how well a model predicts a text, as it reads on",
        description="Read FILE from start to end and print the perplexity of every stretch of it, the speed and the "
        "peak memory. Perplexity is exp of the mean negative log likelihood per token: lower is better.",
    )
    _add_text_options(command)
    command.add_argument("--every", type=positive, default=8192, metavar="N", help="tokens per line (default 8192)")
    command.set_defaults(run=_score)

    command = commands.add_parser(
        "generate",
        help="read a text and continue it",
        description="Read FILE, however long, then print its continuation token by token.",
    )
    _add_text_options(command)
    command.add_argument("--prompt", help="text to add after FILE, for example a question about it")
    command.add_argument("--max-new-tokens", type=positive, default=100, metavar="N", help="default 100")
    command.add_argument("--temperature", type=non_negative, default=0.0, help="0 (default) takes the likeliest token")
    command.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    command.set_defaults(run=_generate)

    command = commands.add_parser(
        "profile",
        help="where the time of a segment goes",
        description="Score the first segments of FILE under PyTorch's profiler and print what each part of the "
        "recurrence takes: summary, recall, main pass, LM head, loss, and the rest; and the peak memory.",
    )
    _add_text_options(command, timed=False)
    command.add_argument("--segments", type=positive, default=4, metavar="N", help="segments to read (default 4)")
    command.add_argument("--trace", metavar="JSON", help="write a chrome trace for Perfetto")
    command.set_defaults(run=_profile)

    add_train(commands, _add_memory_options)
    add_evaluate(commands)

    command = commands.add_parser(
        "info",
        help="versions, devices and usable kernels; with --model also that model's settings",
        description="Print versions, devices and, for each operator, which implementations are usable or why not.",
    )
    command.add_argument("--model", help="directory or hub name of a model to describe as well")
    command.set_defaults(run=_info)
    return parser


def _add_text_options(command: argparse.ArgumentParser, *, timed: bool = True) -> None:
    command.add_argument("file", metavar="FILE", help="UTF-8 text to read")
    command.add_argument("--model", required=True, help="directory or hub name of a causal language model or saved HMT")
    command.add_argument("--max-tokens", type=positive, metavar="N", help="read only the first N tokens of FILE")
    if timed:
        command.add_argument("--max-seconds", type=non_negative, metavar="S", help="stop reading after about S seconds")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
    command.add_argument("--device", help="for example cpu or cuda:0 (default: a GPU when there is one)")
    _add_memory_options(command)


def _add_memory_options(command: argparse.ArgumentParser) -> None:
    memory = command.add_argument_group(
        "memory", "how the text is read; a saved HMT brings its own values, other models use the defaults in brackets"
    )
    memory.add_argument("--mode", choices=MODES, help="hmt: recall the past; rmt: pass one on; baseline: none [hmt]")
    memory.add_argument("--segment-length", type=positive, metavar="L", help="tokens read at a time [512]")
    memory.add_argument("--num-sensory", type=int, metavar="K", help="tokens of the last segment read again [32]")
    memory.add_argument("--queue-size", type=positive, metavar="N", help="past segments that can be recalled [300]")
    memory.add_argument("--causal", action="store_true", help="recall by the previous segment: sees no later token")


def _load(arguments: argparse.Namespace) -> tuple[Loaded, torch.Tensor]:
    names = ("mode", "segment_length", "num_sensory", "queue_size")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.causal:
        settings["summary_source"] = "previous"
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    loaded = load(arguments.model, dtype=dtype, device=arguments.device, **settings)
    ids = encode_file(arguments.file, loaded.tokenizer)[:, : arguments.max_tokens]
    if loaded.untrained and loaded.model.config.mode != "baseline":
        print(UNTRAINED, file=sys.stderr)
    return loaded, ids


def score_with_progress(loaded: Loaded, ids: torch.Tensor, every: int, max_seconds: float | None = None) -> Score:
    """Score ids [1, T] under a progress bar and print a line for each `every` tokens."""
    total = stretch = Score(0, 0, 0.0, 0.0, loaded.model.new_state())
    with tqdm(total=ids.shape[1], unit="tok", desc="reading", smoothing=0.1, file=sys.stderr) as bar:
        tqdm.write(f"{'tokens read':>12}  {'perplexity':>10}  {'tokens/s':>9}")
        for part in score(loaded.model, ids):
            total, stretch = total + part, stretch + part
            bar.update(part.num_tokens)
            timed_out = max_seconds is not None and total.seconds >= max_seconds
            if stretch.num_tokens >= every or timed_out or total.num_tokens == ids.shape[1]:
                speed = stretch.num_tokens / stretch.seconds
                tqdm.write(f"{total.num_tokens:>12,}  {stretch.perplexity:>10.2f}  {speed:>9.0f}")
                stretch = Score(0, 0, 0.0, 0.0, part.state)
            if timed_out:
                break
    return total


def summary_line(total: Score, device: torch.device) -> str:
    """Tokens, speed, perplexity and peak memory of a whole reading."""
    peak = peak_memory_bytes(device) / 2**20
    return (
        f"read {total.num_tokens:,} tokens in {total.seconds:.1f} s: {total.num_tokens / total.seconds:.0f} tokens/s, "
        f"perplexity {total.perplexity:.2f}, peak memory {peak:,.0f} MiB, {total.state.num_closed} segments closed"
    )


def _score(arguments: argparse.Namespace) -> int:
    loaded, ids = _load(arguments)
    if ids.shape[1] < 2:
        raise ValueError("FILE must hold at least two tokens to be scored, of which the second is predicted, got one")
    total = score_with_progress(loaded, ids, arguments.every, arguments.max_seconds)
    print(summary_line(total, loaded.model.device))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    loaded, ids = _load(arguments)
    if arguments.prompt:
        prompt = loaded.tokenizer(arguments.prompt, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids, prompt = ids[:, :-1], ids[:, -1:]
    state = read_with_progress(loaded, ids, arguments.max_seconds) if ids.shape[1] else None
    continue_text(loaded, prompt, state, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    return 0


def read_with_progress(loaded: Loaded, ids: torch.Tensor, max_seconds: float | None = None) -> HMTState:
    """Read ids [1, T] under a progress bar, without computing any logits."""
    model = loaded.model
    step = model.config.summary_batch_size * model.config.segment_length
    state = model.new_state()
    with tqdm(total=ids.shape[1], unit="tok", desc="reading", smoothing=0.1, file=sys.stderr) as bar:
        for part in ids.split(step, dim=1):
            state = model.read(part.to(model.device), state)
            bar.update(part.shape[1])
            if max_seconds is not None and bar.format_dict["elapsed"] >= max_seconds:
                break
    return state


def continue_text(
    loaded: Loaded, prompt: torch.Tensor, state: HMTState | None, max_new_tokens: int, temperature: float, seed: int
) -> None:
    """Print the continuation of what `state` has read and of the prompt ids [1, T], token by token."""
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    loaded.model.generate(
        prompt.to(loaded.model.device),
        attention_mask=torch.ones_like(prompt),
        state=state,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )


def _profile(arguments: argparse.Namespace) -> int:
    loaded, ids = _load(arguments)
    model = loaded.model
    ids = ids[:, : arguments.segments * model.config.segment_length].to(model.device)
    result = profile_pass(model, ids, arguments.trace)
    print(*result.table(), sep="\n")
    print(
        f"{result.num_tokens:,} tokens in {result.num_segments} segments: {result.total:.3f} s profiled, "
        f"{result.unprofiled:.3f} s ({result.num_tokens / result.unprofiled:.0f} tokens/s) without the profiler, "
        f"peak memory {peak_memory_bytes(model.device) / 2**20:,.0f} MiB"
    )
    if arguments.trace:
        print(f"trace written to {arguments.trace}")
    return 0


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
