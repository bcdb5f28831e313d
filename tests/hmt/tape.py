"""What a CUDA graph does, on a CPU: the operators of one run, run again on the memory that they had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmt import capture


class Tape(TorchDispatchMode):
    """Records every operator with its arguments and results; replaying looks at no Python that lay between them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            if function.is_view:
                continue  # of memory that is written already
            again = function(*args, **kwargs)
            if not function._schema.is_mutable:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


def captured(
    step: Callable[[], object], device: torch.device, pool: Any = None, side: Any = None
) -> Callable[[], object]:
    """`capture.captured` with a tape in place of a graph."""
    for _ in range(capture.WARM_UPS):
        step()
    with Tape() as tape:
        step()
    return tape.replay
