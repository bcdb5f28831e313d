"""The operators keep the dtypes they are given, under torch.autocast too."""

from __future__ import annotations

import contextlib

import torch

from hmt_kernels.dispatch import constant_when_compiled


@constant_when_compiled
def _is_available(device_type: str) -> bool:
    """torch.amp.is_autocast_available, which torch.compile of PyTorch 2.11 cannot trace."""
    return torch.amp.is_autocast_available(device_type)


def is_autocast_enabled(device_type: str) -> bool:
    """torch.is_autocast_enabled, which refuses devices without autocast."""
    return _is_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which torch.autocast does not lower the precision of what an implementation computes."""
    if not torch._C._is_any_autocast_enabled():  # two questions cost a microsecond more
        return contextlib.nullcontext()
    if is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
