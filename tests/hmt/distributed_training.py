"""A training in one or several processes: what test_distributed.py compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from backbones import VOCAB, hmt_model
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from hmt.data import Document
from hmt.training import HMTTrainer, Stage

KINDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
}


def train(directory: str | Path, batch_size: int, kind: str | None = None) -> dict[str, Tensor]:
    """Losses, gradient norms and changes of all weights in four steps of `batch_size` examples, twice accumulated."""
    texts = [Document(torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n))) for n in (75, 150, 90)]
    arguments = TrainingArguments(
        str(directory),
        optim="sgd",
        learning_rate=0.05,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=1,
        prediction_loss_only=True,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **KINDS.get(kind or "", {}),
    )
    if kind == "fsdp2" and arguments.device.type == "cpu":
        # accelerate has FSDP2 for every kind of device but CPUs, and asks for the kind here only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = hmt_model(queue_size=2).double()  # rounding is then far below the tolerance
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held_back = [Document(ids.ids[:n]) for ids, n in zip([*texts, texts[0]], (33, 5, 64, 9), strict=True)]
    stages = [Stage(2, (2,), "rmt"), Stage(2, (4,))]
    trainer = HMTTrainer(model, arguments, texts, stages, eval_documents=held_back)
    trainer.train()
    wrapped = trainer.model_wrapped
    found = {"ddp": isinstance(wrapped, DistributedDataParallel), "fsdp2": isinstance(wrapped, FSDPModule)}
    if found != {name: name == kind for name in KINDS}:
        raise RuntimeError(f"the model was not wrapped for {kind}: {type(wrapped).__name__}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()["eval_loss"]
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    whole = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
    changes = {name: w - before[name] for name, w in whole.items()}
    numbers = {
        "loss": torch.tensor(losses),
        "gradient norm": torch.tensor(norms),
        "eval loss": torch.tensor([evaluated]),
    }
    return numbers | changes


def run(folder: Path, rank: int, size: int) -> None:
    """The training under accelerate's DDP and FSDP2, of one of `size` processes; rank 0 writes results."""
    for kind in KINDS:
        found = train(folder, 4 // size, kind)
        if rank == 0:
            save_file({name: x.contiguous() for name, x in found.items()}, folder / f"training-{kind}.safetensors")
