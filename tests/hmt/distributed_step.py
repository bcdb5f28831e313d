"""One training step in one or several processes: what test_distributed.py compares."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from backbones import hmt_model, token_ids
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hmt import HMTForCausalLM

ROWS, LENGTH = 4, 16 * 4 + 5


def build() -> HMTForCausalLM:
    return hmt_model(queue_size=2).double().train()  # rounding is then far below the tolerance


def step(model: nn.Module, rank: int = 0, size: int = 1) -> Tensor:
    """Loss of this process's rows in two rounds of gradient accumulation; gradients are in the model."""
    losses = []
    for half in token_ids(ROWS, LENGTH).chunk(size)[rank].chunk(2):
        loss = model(half, labels=half, num_items_in_batch=ROWS * (LENGTH - 1) // size).loss
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def results(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss and every gradient, whole, by the name of its parameter."""
    found = {"loss": loss}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found[name.removeprefix("module.")] = gradient.contiguous()
    return found


def prepare(kind: str) -> nn.Module:
    """The model as accelerate prepares it; on CPU it has no FSDP2, so the same calls of fully_shard stand here."""
    model = build()
    if kind == "ddp":
        model = Accelerator(cpu=True).prepare(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.backbone.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if not (isinstance(model, DistributedDataParallel) if kind == "ddp" else isinstance(model.memory, DTensor)):
        raise RuntimeError(f"the model was not prepared for {kind}: {type(model).__name__}")
    return model


def run(folder: Path, rank: int, size: int) -> None:
    """The step under DDP and FSDP2, of one of `size` processes; rank 0 writes losses and gradients."""
    for kind in ("ddp", "fsdp2"):
        model = prepare(kind)
        loss = step(model, rank, size)
        dist.all_reduce(loss)
        found = results(model, loss / size)
        if rank == 0:
            save_file(found, folder / f"step-{kind}.safetensors")
