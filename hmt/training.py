"""Training on transformers' Trainer: stages of growing depth, two learning rates, resumption to the bit."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from hmt.backbone import is_quantised
from hmt.config import MODES
from hmt.data import Document, pad_batch, window_example, windows
from hmt.loss import IGNORE_INDEX, shift_left
from hmt.model import HMTForCausalLM
from hmt.modes import reading_as


@dataclass(frozen=True)
class Stage:
    """Optimizer steps on examples of so many segments; several numbers of segments get equal shares of the steps.

    Args:
        steps: optimizer steps.
        segments: segments of one example; a sequence is a curriculum.
        mode: "rmt" passes only the last memory on, without recall; None is the model's own mode.

    Raises:
        ValueError: for a value outside its range, naming the argument.
    """

    steps: int
    segments: Sequence[int]
    mode: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < len(self.segments) or self.steps < 1:
            raise ValueError(
                f"steps must be an integer >= 1 and >= the {len(self.segments)} segments, got {self.steps}"
            )
        if not self.segments or not all(isinstance(n, int) and n >= 1 for n in self.segments):
            raise ValueError(f"segments must be integers >= 1, got {self.segments!r}")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES} or None, got {self.mode!r}")

    @classmethod
    def parse(cls, text: str) -> Stage:
        """From "STEPS:SEGMENTS" or "STEPS:SEGMENTS:MODE", SEGMENTS being numbers with commas between them.

        Example:
            >>> Stage.parse("500:4,8,15")
            Stage(steps=500, segments=(4, 8, 15), mode=None)
        """
        steps, _, rest = text.partition(":")
        segments, _, mode = rest.partition(":")
        try:
            numbers = int(steps), tuple(int(n) for n in segments.split(","))
        except ValueError:
            raise ValueError(f"a stage must be STEPS:SEGMENTS or STEPS:SEGMENTS:MODE, got {text!r}") from None
        return cls(*numbers, mode or None)


# as arXiv 2405.06067 trains: 200 steps of recurrence alone, then 500 with recall over up to 15 segments
PAPER_STAGES = (Stage(200, (2,), "rmt"), Stage(500, (4, 8, 15)))


def plan(stages: Sequence[Stage]) -> list[tuple[int, str | None]]:
    """Number of segments and mode of every optimizer step."""
    return [
        (stage.segments[step * len(stage.segments) // stage.steps], stage.mode)
        for stage in stages
        for step in range(stage.steps)
    ]


class StagedExamples(Dataset):
    """The examples of a whole training in the order in which they are used, `per_step` for each optimizer step.

    Every number of segments has its own windows of the documents, shuffled anew for each pass over them. Which tokens
    example i holds depends on i, the documents and the seed alone, so that a resumed training reads what it would have.
    """

    def __init__(
        self, documents: Sequence[Document], segments: Sequence[int], segment_length: int, per_step: int, seed: int
    ):
        self.documents, self.segment_length, self.per_step, self.seed = documents, segment_length, per_step, seed
        self.segments = list(segments)
        self.windows = {n: windows(documents, n * segment_length) for n in set(self.segments)}
        if not all(self.windows.values()):
            raise ValueError("documents must hold a text of at least two tokens, got none")
        seen = dict.fromkeys(self.windows, 0)
        self.first = []  # of a step, among the examples of its number of segments
        for n in self.segments:
            self.first.append(seen[n])
            seen[n] += per_step
        self._orders: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return len(self.segments) * self.per_step

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, offset = divmod(index, self.per_step)
        n = self.segments[step]
        epoch, position = divmod(self.first[step] + offset, len(self.windows[n]))
        window = self.windows[n][self._order(n, epoch)[position]]
        return window_example(self.documents, window, n * self.segment_length)

    def _order(self, n: int, epoch: int) -> list[int]:
        if (n, epoch) not in self._orders:
            generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + n) * 1_000_003 + epoch) % 2**63)
            self._orders[n, epoch] = torch.randperm(len(self.windows[n]), generator=generator).tolist()
        return self._orders[n, epoch]


class FixedExamples(Dataset):
    """All windows of `segments` segments of some documents, to evaluate on."""

    def __init__(self, documents: Sequence[Document], segments: int, segment_length: int):
        self.documents, self.length = documents, segments * segment_length
        self.windows = windows(documents, self.length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return window_example(self.documents, self.windows[index], self.length)


class HMTTrainer(Trainer):
    """transformers' Trainer with stages, a learning rate for the memory, exponential decay, perplexity and speed.

    Args:
        model: an HMT in any mode; parameters that require no gradient stay as they are (see `hmt.adapters.select`).
        args: TrainingArguments; max_steps follows from the stages.
        documents: what to train on; or a Dataset (PyTorch's, or of the package datasets) of examples that is already
            in order, one after the other.
        stages: what each step trains on, and how.
        memory_learning_rate: of the memory's own parameters; None means args.learning_rate.
        decay: the part of the learning rates that an exponential decay leaves at the end; None leaves the schedule to
            args.lr_scheduler_type.
        eval_documents: evaluated at the last stage's number of segments, when args.eval_strategy says so; eval_loss is
            the mean over tokens. During a training it is read in the mode of the step before, else in the model's own.

    Example:
        >>> arguments = TrainingArguments("out", learning_rate=1e-5, report_to="tensorboard")
        >>> HMTTrainer(model, arguments, documents, PAPER_STAGES, memory_learning_rate=1e-4).train()
    """

    def __init__(
        self,
        model: HMTForCausalLM,
        args: TrainingArguments,
        documents: Sequence[Document] | Dataset,
        stages: Sequence[Stage] = PAPER_STAGES,
        *,
        memory_learning_rate: float | None = None,
        decay: float | None = None,
        eval_documents: Sequence[Document] | None = None,
        **kwargs: Any,
    ):
        if decay is not None and not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must lie in (0, 1], got {decay!r}")
        if is_quantised(model.backbone) and args.save_strategy != "no":
            raise ValueError(
                f"args.save_strategy must be 'no' for a quantised backbone, which no checkpoint can hold, got "
                f"{args.save_strategy.value!r}: save with hmt.adapters.save_adapter in the end"
            )
        if args.auto_find_batch_size:
            raise ValueError(
                "args.auto_find_batch_size must be off: the examples of a stage are counted by its steps' batch size"
            )
        self.plan, self.memory_learning_rate, self.decay = plan(stages), memory_learning_rate, decay
        for mode in {mode for _, mode in self.plan}:
            with reading_as(model, mode):
                pass
        if args.n_gpu > 1:
            warnings.warn(
                f"training on the first of {args.n_gpu} GPUs: start one process per GPU for all of them, with torchrun "
                f"--nproc-per-node {args.n_gpu}",
                stacklevel=2,
            )
            args._n_gpu = 1  # or Trainer would use torch.nn.DataParallel
        args.max_steps = len(self.plan)
        if model.config.mode != "baseline" and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # a stage without recall, a text of one segment: no gradients of it
        if args.include_num_input_tokens_seen == "no":
            args.include_num_input_tokens_seen = "all"
        length = model.config.segment_length
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        examples = documents
        if not isinstance(documents, Dataset) and not (len(documents) and isinstance(documents[0], Mapping)):
            examples = StagedExamples(documents, [n for n, _ in self.plan], length, per_step, args.seed)
        evaluated = None if eval_documents is None else FixedExamples(eval_documents, stages[-1].segments[-1], length)
        kwargs.setdefault("data_collator", pad_batch)
        super().__init__(model, args, train_dataset=examples, eval_dataset=evaluated, **kwargs)
        self._clock: tuple[float, int] | None = None  # when the last loss was logged, and the tokens seen by then
        self._paused = 0.0  # seconds since then in which nothing was trained
        self._evaluated: list[Tensor] = []  # [2] of each batch: summed loss, and of how many tokens

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # the data set is in order already

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, each of its groups split into the backbone's and the memory's own parameters."""
        if self.optimizer is not None or self.memory_learning_rate is None:
            return super().create_optimizer(*([] if model is None else [model]))
        named = (self.model if model is None else model).named_parameters()
        own = {id(p) for name, p in named if "backbone" not in name.split(".")}
        optimizer = super().create_optimizer(*([] if model is None else [model]))
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            for is_own, rate in ((False, group["lr"]), (True, self.memory_learning_rate)):
                parameters = [p for p in group["params"] if (id(p) in own) == is_own]
                if parameters:
                    optimizer.add_param_group({**group, "params": parameters, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's scheduler, or exponential decay after a linear warm-up."""
        existing: Any = getattr(self, "lr_scheduler", None)
        if self.decay is None or existing is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        rate = math.log(self.decay) / max(1, num_training_steps - warmup)

        def factor(step: int) -> float:
            return (step + 1) / (warmup + 1) if step < warmup else math.exp(rate * (step - warmup))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Trainer's, and under FSDP of one length in all processes: they gather each layer's weights together."""
        inputs = super()._prepare_inputs(inputs)
        if not self.is_fsdp_enabled:
            return inputs
        inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
        return inputs | {
            name: self.accelerator.pad_across_processes(
                inputs[name], dim=1, pad_index=IGNORE_INDEX if "labels" in name else 0
            )
            for name in sorted(inputs)
            if isinstance(inputs[name], Tensor)
        }

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self._clock is None:
            self._clock, self._paused = (perf_counter(), self.state.num_input_tokens_seen), 0.0
        with self._stage(self.state.global_step):
            return super().training_step(model, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._clock = None  # it starts with the first step
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's; in an evaluation the mean of this process alone, which is then weighed by its tokens."""
        items = num_items_in_batch if model.training else None
        return super().compute_loss(model, inputs, return_outputs, items)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if not prediction_loss_only:  # with labels, a model computes no logits that nobody asks for
            inputs = {**inputs, "logits_to_keep": 0}
        with self._stage(max(0, self.state.global_step - 1)) if self.is_in_train else contextlib.nullcontext():
            loss, *others = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if loss is not None and "labels" in inputs:
            count = shift_left(inputs["labels"]).ne(IGNORE_INDEX).sum().to(loss)
            self._evaluated.append(torch.stack([torch.where(count > 0, loss * count, 0), count]))
        return loss, *others

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, whose loss is a mean over batches: here it is one over tokens, whatever batch they come in."""
        self._evaluated.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated and f"{metric_key_prefix}_loss" in output.metrics:
            total, count = self.accelerator.reduce(torch.stack(self._evaluated).sum(0)).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / count if count else math.nan
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._pause():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._pause():
            super()._save_checkpoint(*args, **kwargs)

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """Time that does not count as training; what happens within has counted once when it ends."""
        begun, before = perf_counter(), self._paused
        try:
            yield
        finally:
            self._paused = before + perf_counter() - begun

    def _stage(self, step: int) -> contextlib.AbstractContextManager[None]:
        """The mode of a step."""
        _, mode = self.plan[min(step, len(self.plan) - 1)]
        return reading_as(self.accelerator.unwrap_model(self.model), mode)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the perplexity of each loss and the tokens per second since the last training loss."""
        for name in ("loss", "eval_loss"):
            if name in logs:
                logs[name.replace("loss", "ppl")] = math.exp(min(logs[name], 700.0))
        if "loss" in logs and self._clock:
            now, seen = perf_counter(), self.state.num_input_tokens_seen
            then, before = self._clock
            logs["tokens_per_second"] = round((seen - before) / (now - then - self._paused), 1)
            self._clock, self._paused = (now, seen), 0.0
            logs["segments"] = self.plan[self.state.global_step - 1][0]
        super().log(logs)


class KeepTokenizer(TrainerCallback):
    """Puts a tokenizer into every checkpoint, so that it can be read with.

    Trainer's own processing_class would also change the model's special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            self.tokenizer.save_pretrained(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


class NewIntervals(TrainerCallback):
    """Logs, evaluates and saves as often as the arguments of a resumed training say, not as those before."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        state.compute_steps(args, state.max_steps)


def last_checkpoint(directory: str | Path) -> str | None:
    """The latest checkpoint that was written to its end; Trainer's own state is the last file of one."""
    found = []
    for path in Path(directory).glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError, KeyError):
            found.append((int(json.loads(path.read_text())["global_step"]), str(path.parent)))
    return max(found)[1] if found else None
