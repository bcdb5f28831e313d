"""A training in one or several processes: what test_distributed.py compares.

python distributed_training.py FOLDER RANK SIZE runs it under accelerate's DDP; rank 0 writes losses and weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from backbones import VOCAB, hmt_model
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from two_processes import join_group

from hmt.data import Document
from hmt.training import HMTTrainer, Stage


def train(directory: str | Path, batch_size: int, wrapped: bool = False) -> dict[str, Tensor]:
    """Losses and trained weights of four steps on `batch_size` examples per process, twice accumulated."""
    texts = [Document(torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n))) for n in (75, 150, 90)]
    arguments = TrainingArguments(
        str(directory),
        optim="sgd",
        learning_rate=0.05,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    model = hmt_model(queue_size=2).double()  # rounding is then far below the tolerance
    trainer = HMTTrainer(model, arguments, texts, [Stage(2, (2,), "rmt"), Stage(2, (4,))])
    trainer.train()
    if wrapped != isinstance(trainer.model_wrapped, DistributedDataParallel):
        raise RuntimeError(f"the model was not wrapped as expected: {type(trainer.model_wrapped).__name__}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"loss": torch.tensor(losses), **{name: p.detach() for name, p in trainer.model.named_parameters()}}


def main(folder: str, rank: int, size: int) -> None:
    join_group(folder, rank, size)
    found = train(folder, 4 // size, wrapped=True)
    if rank == 0:
        save_file(found, Path(folder) / "trained.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
