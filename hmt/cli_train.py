"""The command line's hmt train DATA."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from hmt.adapters import TRAINABLE, check_directory, is_adapter, save_adapter, select
from hmt.backbone import is_quantised
from hmt.cli_options import add_memory_options, memory_settings, non_negative, positive
from hmt.data import Document, join_documents, load_documents, split_documents
from hmt.loading import load
from hmt.recipes import RECIPES
from hmt.remat import checkpoint_layers
from hmt.state_file import write_whole
from hmt_kernels.info import allocator

if TYPE_CHECKING:
    from transformers import TrainingArguments

RECIPE = "hmt_recipe.json"
DATA_DIGEST = "data_sha256"  # of all tokens, in a recipe
# what may change where a training is resumed
FREE = ("run", "resume", "output", "log_every", "save_every", "tensorboard", "cuda_graphs", "compile_layers")
ALLOCATOR_NOTE = (
    "Note: glibc's malloc leaves holes in memory; on a CPU, training takes about 0.6 times as much beyond "
    "the model with mimalloc (LD_PRELOAD=libmimalloc.so.2 hmt train ...; Debian's libmimalloc2.0)."
)
SCHEDULES = ("exponential", "linear", "cosine", "constant_with_warmup")
DATA_HELP = (
    "a text file, a jsonl file (fields text, or context, question, answer), a folder of both, hub:NAME, or recipe:NAME "
    f"with NAME one of {', '.join(RECIPES)}; recipe:NAME:FILE reads a local copy, recipe:interleaved:DATA and "
    "recipe:dilated:DATA mix the texts of DATA (hmt evaluate --help describes the recipes)"
)


def add_train(commands: Any) -> None:
    """Add `hmt train` to the subcommands."""
    command = commands.add_parser(
        "train",
        help="train the memory of a model, LoRA factors too, or all of it",
        description="Train on DATA in stages; a stage STEPS:SEGMENTS[:MODE] is so many optimizer steps on texts of so "
        "many segments, a list like 4,8,15 being a curriculum. The default is the paper's: 200:2:rmt, then 500:4,8,15.",
    )
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("--model", required=True, help="directory or hub name of a causal language model or saved HMT")
    command.add_argument("--output", required=True, metavar="DIR", help="for checkpoints and the result")
    command.add_argument("--what", choices=TRAINABLE, default="memory", help="what to train (default memory)")
    command.add_argument("--stage", action="append", metavar="STEPS:SEGMENTS[:MODE]", help="repeat for several stages")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR, if there is one")
    data = command.add_argument_group("data")
    add_data_options(data, "train")
    held_out = data.add_mutually_exclusive_group()
    held_out.add_argument("--eval", metavar="DATA", help="evaluate on this as well; of a hub data set, on --eval-split")
    data.add_argument("--eval-split", default="validation", metavar="NAME", help="default validation")
    held_out.add_argument("--eval-fraction", type=float, metavar="F", help="or hold back this part of DATA for it")
    data.add_argument("--across-documents", action="store_true", help="let examples reach from one text into the next")
    steps = command.add_argument_group("optimization")
    steps.add_argument(
        "--learning-rate", type=non_negative, default=1e-5, metavar="R", help="of the backbone (default 1e-5)"
    )
    steps.add_argument(
        "--memory-learning-rate", type=non_negative, metavar="R", help="of the memory (default: the same)"
    )
    steps.add_argument("--schedule", choices=SCHEDULES, default=SCHEDULES[0], help="after the warm-up")
    steps.add_argument("--decay", type=float, default=0.1, metavar="F", help="exponential: part left at the end (0.1)")
    steps.add_argument("--warmup-steps", type=int, default=0, metavar="N")
    steps.add_argument("--weight-decay", type=non_negative, default=0.0, metavar="W")
    steps.add_argument(
        "--max-grad-norm", type=non_negative, default=1.0, metavar="G", help="gradients are clipped to it (1.0)"
    )
    steps.add_argument("--batch-size", type=positive, default=1, metavar="B", help="examples at a time (default 1)")
    steps.add_argument(
        "--accumulate", type=positive, default=1, metavar="A", help="batches per optimizer step (default 1)"
    )
    steps.add_argument("--bf16", action="store_true", help="compute in bfloat16, keep weights in float32")
    steps.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="faster on a GPU, for a second set of gradients in its memory; without effect on LoRA factors",
    )
    steps.add_argument(
        "--compile-layers",
        action="store_true",
        help="faster and smaller after a minute of torch.compile (needs a C++ compiler, on a GPU Triton)",
    )
    steps.add_argument(
        "--checkpoint-layers",
        action="store_true",
        help="keep one layer's activations at a time instead of one segment's, for another forward pass",
    )
    steps.add_argument("--lora-rank", type=positive, default=8, metavar="R")
    steps.add_argument("--lora-alpha", type=int, default=32, metavar="A")
    steps.add_argument("--seed", type=int, default=0)
    log = command.add_argument_group("log and checkpoints")
    log.add_argument("--log-every", type=positive, default=10, metavar="N", help="steps (default 10)")
    log.add_argument("--save-every", type=positive, default=100, metavar="N", help="steps (default 100)")
    log.add_argument("--tensorboard", action="store_true", help="write logs for TensorBoard into DIR/runs as well")
    add_memory_options(command)
    command.set_defaults(run=partial(_train, command))


def add_data_options(group: Any, split: str) -> None:
    group.add_argument("--split", default=split, metavar="NAME", help=f"of a hub data set or recipe (default {split})")
    group.add_argument("--text-field", default="text", metavar="NAME", help="of jsonl and hub data sets (default text)")
    group.add_argument("--max-documents", type=positive, metavar="N", help="use only the first N documents")


def _train(command: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    # Trainer brings a lot with it, which the other commands need not wait for
    from hmt.training import PAPER_STAGES, HMTTrainer, KeepTokenizer, NewIntervals, Stage, last_checkpoint

    stages = tuple(map(Stage.parse, arguments.stage)) if arguments.stage else PAPER_STAGES
    settings = memory_settings(arguments)
    if arguments.cuda_graphs:
        settings["cuda_graphs"] = True
    if arguments.compile_layers:
        settings["compile_layers"] = True
    if arguments.what != "full":
        check_directory(arguments.output, arguments.model)
    elif is_adapter(arguments.output):
        raise ValueError(f"--output must be another folder for a whole model: {arguments.output!r} holds an adapter")
    # Trainer moves it
    loaded = load(arguments.model, dtype=torch.float32, device="cpu", seed=arguments.seed, **settings)
    if loaded.model.config.mode != "hmt" and not arguments.stage:
        stages = tuple(Stage(stage.steps, stage.segments) for stage in PAPER_STAGES)
    output = Path(arguments.output)
    checkpoint = last_checkpoint(output)
    if checkpoint is not None and not arguments.resume:
        raise ValueError(f"--output must be without checkpoints, or --resume given: {str(output)!r} has {checkpoint!r}")
    recipe = {name: value for name, value in vars(arguments).items() if name not in FREE}
    before = _recipe_before(output, command) if checkpoint is not None else {}
    _check_same(recipe, before)
    documents, evaluated = _documents_and_evaluated(arguments, loaded.tokenizer)
    recipe[DATA_DIGEST] = _digest([*documents, *(evaluated or [])])
    _check_same(recipe, before)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / RECIPE, (json.dumps(recipe, indent=2) + "\n").encode())
    if arguments.checkpoint_layers:
        checkpoint_layers(loaded.model)
    torch.manual_seed(arguments.seed)  # of LoRA factors
    count = select(loaded.model, arguments.what, rank=arguments.lora_rank, alpha=arguments.lora_alpha)
    tokens = sum(len(d.ids) for d in documents)
    print(f"training {count:,} parameters on {len(documents)} documents of {tokens:,} tokens", file=sys.stderr)
    if not torch.cuda.is_available() and allocator().startswith("glibc"):
        print(ALLOCATOR_NOTE, file=sys.stderr)
    trainer = HMTTrainer(
        loaded.model,
        training_arguments(arguments, evaluated is not None, saves=not is_quantised(loaded.model.backbone)),
        documents,
        stages,
        memory_learning_rate=arguments.memory_learning_rate,
        decay=arguments.decay if arguments.schedule == "exponential" else None,
        eval_documents=evaluated,
    )
    trainer.add_callback(KeepTokenizer(loaded.tokenizer))
    trainer.add_callback(NewIntervals())
    trainer.train(resume_from_checkpoint=checkpoint)
    loaded.model.config.update({"cuda_graphs": None, "compile_layers": False})  # who loads the result decides anew
    if trainer.is_world_process_zero():
        if arguments.what == "full":
            loaded.model.save_pretrained(output)
        else:
            save_adapter(loaded.model, output, arguments.model)
        loaded.tokenizer.save_pretrained(output)
        print(f"saved to {output}")
    return 0


def training_arguments(arguments: argparse.Namespace, evaluates: bool, saves: bool = True) -> TrainingArguments:
    """The options of `hmt train` as transformers knows them; checkpoints where the model `saves`."""
    from transformers import TrainingArguments

    exponential = arguments.schedule == "exponential"
    return TrainingArguments(
        arguments.output,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant_with_warmup" if exponential else arguments.schedule,
        warmup_steps=arguments.warmup_steps,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        bf16=arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),  # or it refuses bf16
        seed=arguments.seed,
        logging_steps=arguments.log_every,
        save_strategy="steps" if saves else "no",
        save_steps=arguments.save_every,
        save_total_limit=2,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=arguments.save_every,
        report_to="tensorboard" if arguments.tensorboard else "none",
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _recipe_before(output: Path, command: argparse.ArgumentParser) -> dict[str, Any]:
    """Options of the training that left its checkpoints in `output`; those that it did not know had their defaults."""
    file = output / RECIPE
    if not file.is_file():
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    return {action.dest: action.default for action in command._actions} | before


def _check_same(recipe: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises ValueError where a training would go on with other options or data."""
    changed = [name for name, value in recipe.items() if before.get(name, value) != value]
    if changed == [DATA_DIGEST]:
        raise ValueError("--resume must be given the same data as before, but its texts or their tokens have changed")
    if changed:
        raise ValueError(
            "--resume must be given the same options as before, but these differ: "
            + ", ".join(f"{name} ({before[name]!r}, now {recipe[name]!r})" for name in changed)
        )


def _digest(documents: Sequence[Document]) -> str:
    """SHA-256 of all tokens and of where documents and answers begin."""
    digest = hashlib.sha256()
    for ids, answer_start in documents:
        digest.update(f"{len(ids)} {answer_start} ".encode() + ids.numpy().tobytes())
    return digest.hexdigest()


def _documents_and_evaluated(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Document], list[Document] | None]:
    """What to train on, and what to evaluate on, if anything."""
    documents = _documents(arguments.data, tokenizer, arguments, arguments.split)
    if arguments.eval:
        return documents, _documents(arguments.eval, tokenizer, arguments, arguments.eval_split)
    if arguments.eval_fraction is not None:
        return split_documents(documents, arguments.eval_fraction)
    return documents, None


def _documents(
    source: str, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace, split: str
) -> list[Document]:
    field, limit = arguments.text_field, arguments.max_documents
    documents = load_documents(source, tokenizer, split=split, text_field=field, limit=limit)
    if arguments.across_documents:
        documents = [join_documents(documents, tokenizer.eos_token_id)]
    return documents
