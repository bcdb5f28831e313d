"""A training with dropout, two stages, accumulation and padding; as a script, it kills itself in the sixth step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from backbones import VOCAB, hmt_model
from transformers import TrainerCallback, TrainingArguments

from hmt.adapters import select
from hmt.data import Document
from hmt.training import HMTTrainer, Stage


class Kill(TrainerCallback):
    """No chance to clean up: not even Python sees this signal."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def build(directory: str | Path, what: str) -> HMTTrainer:
    """Eight steps with a checkpoint after every fourth."""
    torch.manual_seed(0)
    model = hmt_model("gpt2")  # with dropout, so that random states matter
    select(model, what, rank=2)
    documents = [Document(torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n))) for n in (75, 150)]
    arguments = TrainingArguments(
        str(directory),
        learning_rate=1e-2,
        warmup_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=4,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    stages = [Stage(3, (2,), "rmt"), Stage(5, (3, 4))]
    return HMTTrainer(model, arguments, documents, stages, memory_learning_rate=3e-2, decay=0.5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    training = build(sys.argv[1], sys.argv[2])
    training.add_callback(Kill())
    training.train()
