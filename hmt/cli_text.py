"""The command line's hmt score, read, generate and profile FILE."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TextStreamer

from hmt.adapters import SETTINGS
from hmt.cli_options import add_memory_options, memory_settings, non_negative, positive
from hmt.encoding import encode_file, encode_text, encode_turn
from hmt.loading import Loaded, load
from hmt.profiling import profile_pass
from hmt.scoring import Score, peak_memory_bytes, score
from hmt.state import HMTState
from hmt.state_file import check_folder, made_with, save_state

UNTRAINED = (
    "Note: the memory of this model is untrained (fresh random parameters around an existing language model).\n"
    "It reads any length at constant memory, but what it recalls carries no information yet: expect a perplexity\n"
    "above the bare model's."
)


def add_text_commands(commands: Any) -> None:
    """Add `hmt score`, `read`, `generate` and `profile` to the subcommands."""
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
        "read",
        help="read a text once and keep what is remembered of it",
        description="Read FILE, without predicting anything, and write the state after it to a small file, from which "
        "hmt generate, score and read go on (--state), here or elsewhere.",
    )
    _add_text_options(command)
    command.add_argument(
        "--output", required=True, metavar="STATE", help="the file to write, for example book.safetensors"
    )
    command.set_defaults(run=_read)

    command = commands.add_parser(
        "generate",
        help="read a text and continue it",
        description="Read FILE, however long, then print its continuation token by token. With --state, what was read "
        "before comes first, and FILE may be left out.",
    )
    _add_text_options(command, needs_file=False)
    command.add_argument("--prompt", help="text to add after FILE, for example a question about it")
    command.add_argument("--chat", action="store_true", help="ask --prompt as a chat model's user does, for its answer")
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
    _add_text_options(command, continues=False)
    command.add_argument("--segments", type=positive, default=4, metavar="N", help="segments to read (default 4)")
    command.add_argument("--trace", metavar="JSON", help="write a chrome trace for Perfetto")
    command.set_defaults(run=_profile)


def _add_text_options(command: argparse.ArgumentParser, *, continues: bool = True, needs_file: bool = True) -> None:
    command.add_argument("file", metavar="FILE", nargs=None if needs_file else "?", help="UTF-8 text to read")
    command.add_argument("--model", required=True, help="directory or hub name of a causal language model or saved HMT")
    command.add_argument("--max-tokens", type=positive, metavar="N", help="read only the first N tokens of FILE")
    command.set_defaults(state=None)
    if continues:
        command.add_argument("--max-seconds", type=non_negative, metavar="S", help="stop reading after about S seconds")
        command.add_argument("--state", help="go on from what hmt read wrote, with the settings that it had")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
    command.add_argument("--device", help="for example cpu or cuda:0 (default: a GPU when there is one)")
    add_memory_options(command)


def _load(arguments: argparse.Namespace) -> tuple[Loaded, torch.Tensor, HMTState | None]:
    """The model, the ids [1, T] of FILE (none without it), and the state that --state names."""
    settings = memory_settings(arguments)
    if arguments.state:
        settings |= _settings_before(arguments, settings)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model, tokenizer, untrained = loaded = load(arguments.model, dtype=dtype, device=arguments.device, **settings)
    state = HMTState.load(arguments.state).to(model.device, model.dtype) if arguments.state else None
    ids = torch.zeros(1, 0, dtype=torch.long)
    if arguments.file is not None:
        ids = encode_file(arguments.file, tokenizer, add_special_tokens=state is None, max_tokens=arguments.max_tokens)
    if untrained and model.config.mode != "baseline":
        print(UNTRAINED, file=sys.stderr)
    return loaded, ids, state


def _settings_before(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """How the text of --state was read; `settings` given now must be the same.

    Raises:
        ValueError: they are not; a damaged file.
    """
    before = made_with(arguments.state)
    if (model := before.pop("model", arguments.model)) != arguments.model:
        print(f"Note: {arguments.state} was read with the model {model}, not with {arguments.model}", file=sys.stderr)
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise ValueError(f"{name} must be {before[name]!r}, as {arguments.state!r} was read with, got {value!r}")
    return before


def score_with_progress(
    loaded: Loaded, ids: torch.Tensor, every: int, max_seconds: float | None = None, state: HMTState | None = None
) -> Score:
    """Score ids [1, T] after `state` under a progress bar and print a line for each `every` tokens."""
    total = stretch = Score(0, 0, 0.0, 0.0, state or loaded.model.new_state())
    with tqdm(total=ids.shape[1], unit="tok", desc="reading", smoothing=0.1, file=sys.stderr) as bar:
        tqdm.write(f"{'tokens read':>12}  {'perplexity':>10}  {'tokens/s':>9}")
        for part in score(loaded.model, ids, state):
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
    loaded, ids, state = _load(arguments)
    if ids.shape[1] < 2:
        raise ValueError("FILE must hold at least two tokens to be scored, of which the second is predicted, got one")
    total = score_with_progress(loaded, ids, arguments.every, arguments.max_seconds, state)
    print(summary_line(total, loaded.model.device))
    return 0


def _read(arguments: argparse.Namespace) -> int:
    check_folder(arguments.output)
    loaded, ids, state = _load(arguments)
    config = loaded.model.config
    state = read_with_progress(loaded, ids, arguments.max_seconds, state)
    save_state(state, arguments.output, {"model": arguments.model} | {name: getattr(config, name) for name in SETTINGS})
    tokens, size = state.num_closed * config.segment_length + state.num_open, os.path.getsize(arguments.output)
    print(
        f"{arguments.output} remembers {tokens:,} tokens, {state.num_closed} segments closed, in {size / 2**20:.1f} MiB"
    )
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.chat and not arguments.prompt:
        raise ValueError("--prompt must hold what --chat asks, got none")
    loaded, ids, state = _load(arguments)
    if arguments.chat:
        prompt = encode_turn(arguments.prompt, loaded.tokenizer, follows=state is not None or ids.shape[1] > 0)
    elif arguments.prompt:
        begins = state is None and not ids.shape[1]
        prompt = encode_text(arguments.prompt, loaded.tokenizer, add_special_tokens=begins)[None]
    elif ids.shape[1]:
        ids, prompt = ids[:, :-1], ids[:, -1:]
    else:
        raise ValueError("there must be a FILE or a --prompt to continue, got neither")
    if ids.shape[1]:
        state = read_with_progress(loaded, ids, arguments.max_seconds, state)
    continue_text(loaded, prompt, state, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    return 0


def read_with_progress(
    loaded: Loaded, ids: torch.Tensor, max_seconds: float | None = None, state: HMTState | None = None
) -> HMTState:
    """Read ids [1, T] after `state` under a progress bar, without computing any logits."""
    model = loaded.model
    step = model.config.summary_batch_size * model.config.segment_length
    state = state or model.new_state()
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
    loaded, ids, _ = _load(arguments)
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
