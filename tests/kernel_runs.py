"""For tests of kernels: new memory that is poisoned, and another order of the blocks of a launch."""

from __future__ import annotations

import pytest
import torch


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel should have written and did not is NaN, or a number that no result has."""

    def poisoned(allocate):
        def allocate_and_fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

        return allocate_and_fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def shuffle_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter, which runs block after block, take them in another order; a GPU has one of its own."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    orders: dict[int, list[int]] = {}

    def set_grid_idx(x, y, z):
        blocks = builder.grid_dim[0]
        order = orders.setdefault(blocks, torch.randperm(blocks).tolist())
        type(builder).set_grid_idx(builder, order[x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
