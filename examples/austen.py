"""Train the adapters in examples/adapters on four novels of Jane Austen, or measure them on a fifth, Persuasion.

    python examples/austen.py train NOVELS      # a folder with the four novels as text files; about an hour of one core
    python examples/austen.py evaluate          # the table and plot in examples/results from the shipped adapters

The novels are Emma, Mansfield Park, Pride and Prejudice, and Sense and Sensibility, numbers 158, 141, 1342 and 161 of
Project Gutenberg (gutenberg.org). Every mode starts from SmolLM2-135M-Instruct as `make demo` converts it and has the
same LoRA layers, texts, order of texts, steps and learning rates; they differ in their memory alone.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import torch
from read_novel import ADAPTERS, MODEL, NOVEL, convert
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hmt import HMTForCausalLM
from hmt.adapters import load_adapter, save_adapter, select
from hmt.config import MODES
from hmt.data import Document, load_documents
from hmt.evaluation import Curve, read_curve, report, save_report
from hmt.training import HMTTrainer, Stage

SETTINGS = {"segment_length": 64, "num_sensory": 8, "queue_size": 32}
RECALL_SCALE = 10.0  # spreads the scores of memories of this length over about 1, with projections that change nothing
STAGES = (Stage(44, (4,)), Stage(22, (8,)))
LEARNING_RATE, MEMORY_LEARNING_RATE, WARMUP_STEPS, BATCH_SIZE = 1e-3, 5e-4, 6, 2
LORA = {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
READINGS = {
    "hmt": ("hmt", None),
    "hmt-causal": ("hmt", "previous"),
    "rmt": ("rmt", None),
    "baseline": ("baseline", None),
}
RESULT = Path(__file__).parent / "results" / "persuasion.json"


def build(mode: str, first_token: int) -> HMTForCausalLM:
    """SmolLM2 with untrained memory that does no harm: it begins with a token, and recalls by plain similarity."""
    backbone = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    recall = {"recall_softmax_scale": RECALL_SCALE} if mode == "hmt" else {}
    model = HMTForCausalLM.from_backbone(
        backbone, mode=mode, rematerialize=False, loss_chunk_size=1024, **recall, **SETTINGS
    )
    with torch.no_grad():
        for name in ("memory", "summary_prompt"):
            if hasattr(model, name):
                getattr(model, name).copy_(model.get_input_embeddings().weight[first_token])
        if mode == "hmt":
            nn.init.eye_(model.recall.wq.weight)
            nn.init.eye_(model.recall.wk.weight)
    torch.manual_seed(0)  # the same LoRA factors for every mode
    select(model, "lora", **LORA)
    return model


def train(model: HMTForCausalLM, documents: list[Document], stages: tuple[Stage, ...], target: Path) -> None:
    """Train, and write the adapter and the log of its training."""
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP_STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = HMTTrainer(model, options, documents, stages, memory_learning_rate=MEMORY_LEARNING_RATE)
        trainer.train()
    save_adapter(model, target, MODEL.relative_to(MODEL.parents[1]).as_posix(), dtype=torch.bfloat16)
    columns = ("step", "segments", "num_input_tokens_seen", "learning_rate", "grad_norm", "loss")
    with (target / "training_log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(entry for entry in trainer.state.log_history if "loss" in entry)


def evaluate(documents: list[Document], adapters: Path, segments: int, stretches: int | None) -> dict[str, Curve]:
    """Every reading's curve on the same stretches of the text."""
    curves = {}
    for label, (mode, source) in READINGS.items():
        backbone = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model = load_adapter(adapters / mode, backbone).eval()
        found = read_curve(model, documents, segments, summary_source=source, limit=stretches)
        for curve in tqdm(found, desc=label, unit="stretch"):
            curves[label] = curve
    return curves


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of the adapters")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the adapters of all modes")
    training.add_argument("novels", type=Path, help="folder of text files")
    training.add_argument("--mode", action="append", choices=MODES, help="only this mode; repeat for several")
    training.add_argument("--stage", action="append", type=Stage.parse, metavar="STEPS:SEGMENTS[:MODE]")
    measuring = commands.add_parser("evaluate", help="compare how well the adapters predict a text")
    measuring.add_argument("--text", type=Path, default=NOVEL)
    measuring.add_argument("--segments", type=int, default=32, help="of a stretch read with one memory (default 32)")
    measuring.add_argument("--stretches", type=int, default=16, help="read only the first so many (default 16)")
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
        for mode in arguments.mode or MODES:
            model = build(mode, tokenizer("\n").input_ids[0])
            train(model, documents, tuple(arguments.stage or STAGES), arguments.adapters / mode)
        return
    documents = load_documents(arguments.text, tokenizer)
    curves = evaluate(documents, arguments.adapters, arguments.segments, arguments.stretches)
    found = report(curves, SETTINGS["segment_length"])
    for label, reading in found["readings"].items():
        print(f"{label:>12}  perplexity {reading['perplexity']:.3f} on {reading['tokens_predicted']:,} tokens")
    for c in found["comparisons"]:
        low, high = c["interval"]
        print(f"{c['a']} - {c['b']}: {c['nats_per_token']:+.4f} nats per token, 95 % in [{low:+.4f}, {high:+.4f}]")
    save_report(found, arguments.output)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
