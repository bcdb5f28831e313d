"""The operators keep the dtypes they are given, under torch.autocast too."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which torch.autocast does not lower the precision of what an implementation computes."""
    if not torch._C._is_any_autocast_enabled():  # two questions cost a microsecond more
        return contextlib.nullcontext()
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
