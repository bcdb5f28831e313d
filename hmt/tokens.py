"""Token ids with an optional padding mask, cut and joined together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tokens(NamedTuple):
    """Token ids [B, T] and, when some of them are padding, a boolean mask [B, T] that is false there."""

    ids: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, attention_mask: Tensor | None) -> Tokens:
        """Tokens with transformers' attention_mask (0: padding); one that hides nothing is dropped."""
        if attention_mask is None or bool(attention_mask.all()):
            return cls(ids)
        return cls(ids, attention_mask.bool())

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def slice(self, start: int, stop: int) -> Tokens:
        """Tokens start to stop, as a view."""
        return Tokens(self.ids[:, start:stop], None if self.mask is None else self.mask[:, start:stop])

    def last(self, count: int) -> Tokens:
        """The last `count` tokens, or all when there are fewer."""
        return self.slice(max(0, self.length - count), self.length)

    def visible(self) -> Tensor:
        """The mask, made up when nothing is padding."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask


def _concatenate(parts: Sequence[Tokens], dim: int) -> Tokens:
    ids = torch.cat([p.ids for p in parts], dim=dim)
    if all(p.mask is None for p in parts):
        return Tokens(ids)
    return Tokens(ids, torch.cat([p.visible() for p in parts], dim=dim))


def join(*parts: Tokens) -> Tokens:
    """Texts one after the other, row by row."""
    return _concatenate(parts, dim=1)


def stack_rows(parts: Sequence[Tokens]) -> Tokens:
    """Texts of equal length as more rows of one batch."""
    return _concatenate(parts, dim=0)


def split(text: Tokens, length: int) -> list[Tokens]:
    """Segments of `length` tokens, the last maybe shorter; those without padding lose their mask (one look for all)."""
    segments = [text.slice(start, start + length) for start in range(0, text.length, length)]
    if text.mask is None:
        return segments
    columns = F.pad(text.mask.all(dim=0), (0, len(segments) * length - text.length), value=True)
    unpadded = columns.view(-1, length).all(dim=1).tolist()
    return [Tokens(s.ids) if clean else s for s, clean in zip(segments, unpadded, strict=True)]
