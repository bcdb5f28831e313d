"""Train the adapters in examples/adapters on four novels of Jane Austen, or measure them on a fifth, Persuasion.

    python examples/austen.py train NOVELS      # a folder with the four novels as text files; under an hour of one core
    python examples/austen.py evaluate          # the table and plot in examples/results from the shipped adapters

The novels are Emma, Mansfield Park, Pride and Prejudice, and Sense and Sensibility, numbers 158, 141, 1342 and 161 of
Project Gutenberg (gutenberg.org). The adapter "base" makes SmolLM2-135M-Instruct, as `make demo` converts it, used to
them and to short segments, without memory. From there the READERS go on with the same LoRA layers, texts, order of
texts, steps and learning rates. They differ in their memory alone, as those of HMT-pytorch do: "hmt" has all of it,
"rmt" passes one memory embedding along, "baseline" has none; "sensory" is the part of HMT that is no embedding.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from read_novel import ADAPTERS, MODEL, NOVEL, convert
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hmt import HMTForCausalLM
from hmt.adapters import load_adapter, save_adapter, select
from hmt.data import Document, load_documents
from hmt.evaluation import Curve, draw, read_curve, report
from hmt.reports import write_report
from hmt.training import HMTTrainer, Stage

SEGMENT_LENGTH, NUM_SENSORY, QUEUE_SIZE = 64, 8, 32
READERS = {
    "hmt": {"mode": "hmt", "num_sensory": NUM_SENSORY},
    "rmt": {"mode": "rmt", "num_sensory": 0},
    "sensory": {"mode": "baseline", "num_sensory": NUM_SENSORY},
    "baseline": {"mode": "baseline", "num_sensory": 0},
}
RECALL_SCALE = 640.0  # spreads the scores of memories of this length over about 1, with projections that change nothing
RANK, WARMUP_STEPS, MEMORY_LEARNING_RATE = 8, 6, 1e-3
BPTT_DEPTH = 4  # gradients through more segments are now and then a thousand times as long, and drown the others
READINGS = {"hmt": ("hmt", None), "hmt-causal": ("hmt", "previous"), **{name: (name, None) for name in READERS}}
RESULT = Path(__file__).parent / "results" / "persuasion.json"


class Recipe(NamedTuple):
    """What the training of "base" and that of the readers have differently."""

    stages: tuple[Stage, ...]
    batch_size: int
    learning_rate: float
    max_grad_norm: float
    adam_beta2: float
    bf16: bool


BASE = Recipe(
    stages=(Stage(44, (4,)), Stage(22, (8,))),
    batch_size=2,
    learning_rate=1e-3,
    max_grad_norm=1.0,
    adam_beta2=0.999,
    bf16=False,
)
READER = Recipe(
    stages=(Stage(64, (8,)),), batch_size=4, learning_rate=3e-3, max_grad_norm=0.3, adam_beta2=0.99, bf16=True
)


def build(name: str, base: Path) -> HMTForCausalLM:
    """SmolLM2, adapted to the novels but for "base" itself, with fresh memory that does no harm.

    A memory begins as the embedding of a line break, and recall as plain similarity of summaries and memories.
    """
    first_token = AutoTokenizer.from_pretrained(MODEL)("\n").input_ids[0]
    backbone = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if name != "base":
        backbone = load_adapter(base, backbone).backbone
    model = HMTForCausalLM.from_backbone(
        backbone,
        **READERS["sensory" if name == "base" else name],
        segment_length=SEGMENT_LENGTH,
        queue_size=QUEUE_SIZE,
        recall_softmax_scale=RECALL_SCALE,
        bptt_depth=BPTT_DEPTH,
        rematerialize=False,
        loss_chunk_size=1024,
    )
    with torch.no_grad():
        for slot in ("memory", "summary_prompt"):
            if hasattr(model, slot):
                getattr(model, slot).copy_(model.get_input_embeddings().weight[first_token])
        if name == "hmt":
            nn.init.eye_(model.recall.wq.weight)
            nn.init.eye_(model.recall.wk.weight)
    torch.manual_seed(0)  # the same LoRA factors for every mode
    select(model, "lora", rank=RANK, alpha=2 * RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return model


def train(name: str, documents: list[Document], arguments: argparse.Namespace) -> None:
    """Train one adapter, and write it and the log of its training."""
    base, target = arguments.adapters / "base", arguments.adapters / name
    recipe, model = BASE if name == "base" else READER, build(name, base)
    if recipe.bf16:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()  # what autocast would make of it anew for each product
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP_STEPS,
            max_grad_norm=recipe.max_grad_norm,
            adam_beta2=recipe.adam_beta2,
            per_device_train_batch_size=arguments.batch_size or recipe.batch_size,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=arguments.device == "cpu",
            bf16=recipe.bf16,
            dataloader_pin_memory=False,
        )
        stages = arguments.stage or recipe.stages
        trainer = HMTTrainer(model, options, documents, stages, memory_learning_rate=MEMORY_LEARNING_RATE)
        trainer.train()
    below = os.path.relpath(MODEL if name == "base" else base, MODEL.parents[1])  # from the repository's root
    save_adapter(model, target, below, dtype=torch.bfloat16)
    columns = ("step", "segments", "num_input_tokens_seen", "learning_rate", "grad_norm", "loss")
    with (target / "training_log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(entry for entry in trainer.state.log_history if "loss" in entry)


def reader(name: str, adapters: Path, device: str) -> HMTForCausalLM:
    """SmolLM2 with an adapter and the one that it was trained upon."""
    backbone = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return load_adapter(adapters / name, load_adapter(adapters / "base", backbone).backbone).eval().to(device)


def evaluate(documents: list[Document], adapters: Path, segments: int, stretches: int, device: str) -> dict[str, Curve]:
    """Every reading's curve on the same stretches of the text."""
    curves = {}
    for label, (name, source) in READINGS.items():
        model = reader(name, adapters, device)
        found = read_curve(model, documents, segments, summary_source=source, limit=stretches)
        for curve in tqdm(found, desc=label, unit="stretch"):
            curves[label] = curve
    return curves


def at_once(documents: list[Document], adapters: Path, segments: int, stretches: int, device: str) -> Curve:
    """The model without memory with each stretch as one window: what a memory has to make up for."""
    model = reader("baseline", adapters, device)
    model.config.segment_length = segments * SEGMENT_LENGTH
    *_, curve = tqdm(read_curve(model, documents, 1, limit=stretches), desc="at once", unit="stretch")
    return curve


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of the adapters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the adapters of all modes")
    training.add_argument("novels", type=Path, help="folder of text files")
    training.add_argument(
        "--only", action="append", choices=["base", *READERS], help="repeat for several (default all)"
    )
    training.add_argument("--stage", action="append", type=Stage.parse, metavar="STEPS:SEGMENTS[:MODE]")
    training.add_argument("--batch-size", type=int, metavar="B")
    measuring = commands.add_parser("evaluate", help="compare how well the adapters predict a text")
    measuring.add_argument("--text", type=Path, default=NOVEL)
    measuring.add_argument("--segments", type=int, default=16, help="of a stretch read with one memory (default 16)")
    measuring.add_argument("--stretches", type=int, default=32, help="read only the first so many (default 32)")
    measuring.add_argument("--output", type=Path, default=RESULT, help="JSON, with a plot beside it")
    arguments = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not MODEL.is_dir():
        MODEL.parent.mkdir(exist_ok=True)
        convert(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if arguments.command == "train":
        documents = load_documents(arguments.novels, tokenizer)
        for name in arguments.only or ("base", *READERS):
            train(name, documents, arguments)
        return
    documents = load_documents(arguments.text, tokenizer)
    what = (documents, arguments.adapters, arguments.segments, arguments.stretches, arguments.device)
    curves = evaluate(*what)
    found = report(curves, SEGMENT_LENGTH)
    found["at_once"] = {"window": arguments.segments * SEGMENT_LENGTH, "perplexity": at_once(*what).perplexity}
    for label, reading in found["readings"].items():
        print(f"{label:>12}  perplexity {reading['perplexity']:.3f} on {reading['tokens_predicted']:,} tokens")
    print(f"{'at once':>12}  perplexity {found['at_once']['perplexity']:.3f}, without memory in one window")
    for c in found["comparisons"]:
        low, high = c["interval"]
        print(f"{c['a']} - {c['b']}: {c['nats_per_token']:+.4f} nats per token, 95 % in [{low:+.4f}, {high:+.4f}]")
    write_report(found, arguments.output, draw)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
