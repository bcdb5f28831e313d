"""Launching a Triton kernel: what a launch consists of, so that it can be run here and compiled for a GPU elsewhere."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton


class Target(NamedTuple):
    arch: int  # compute capability, 90 for 9.0
    multiprocessors: int


class Launch(NamedTuple):
    kernel: Any
    grid: int
    arguments: dict[str, Any]  # tensors, numbers and compile-time constants by name
    num_warps: int


@functools.lru_cache
def target_of(device: torch.device) -> Target:
    """The GPU behind a device; a small imaginary one for the interpreter, which runs one block at a time."""
    if device.type != "cuda":
        return Target(arch=90, multiprocessors=8)
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


def is_interpreted(kernel: Any) -> bool:
    return not isinstance(kernel, triton.JITFunction)


def missing(kernel: Any) -> str | None:
    """Why Triton kernels cannot run on this machine (None: they can)."""
    if is_interpreted(kernel):
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET=1 was not set before triton was imported"
    if torch.version.cuda is None:
        return "this PyTorch is not built for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the GPU's compute capability is {major}.{minor}, 8.0 is needed"


def run(launch: Launch, device: torch.device) -> None:
    if launch.grid == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Multiply-adds are fused whatever the default of this Triton version.
        launch.kernel[(launch.grid,)](**launch.arguments, num_warps=launch.num_warps, enable_fp_fusion=True)
