"""The recurrence never waits for a value: on a GPU each look at a tensor's contents would stop the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import hmt_model, token_ids
from live_memory import peak_bytes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmt_kernels import use_impl

OPERATORS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "_assert_async")
METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class Looks(TorchDispatchMode):
    """Names of everything that reads values on the host: operators, indexing by a mask, and methods of tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.found: list[str] = []
        for name in METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def look(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found.append(f"Tensor.{name}")
            return method(tensor, *args, **kwargs)

        return look

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if name in OPERATORS or by_mask:
            self.found.append(f"aten.{name}")
        return function(*args, **(kwargs or {}))


def test_the_counter_sees_every_way_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    x, one = torch.arange(3), torch.tensor(1)
    ways = [
        lambda: bool(x.any()), lambda: x[0].item(), lambda: x.tolist(), lambda: x.cpu(), lambda: torch.nonzero(x),
        lambda: x[x > 1], lambda: torch.equal(x, x), lambda: int(x[1]), lambda: float(x[1]), lambda: [1, 2][one],
    ]  # fmt: skip
    with Looks(monkeypatch) as looks:
        for number, way in enumerate(ways):
            before = len(looks.found)
            way()
            assert len(looks.found) > before, f"way {number} was not seen"


def run(kind: str, segments: int, padded: bool, looks: Looks, static: bool = False) -> list[str]:
    """What a call over so many segments looks at."""
    model = hmt_model(summary_batch_size=2, cuda_graphs=static)
    ids = token_ids(2, 16 * segments + 5)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        for start in range(16, ids.shape[1], 16):
            mask[1, start + 2 : start + 7] = 0
    # the implementation for CPU tensors may read their values, which costs nothing there
    with use_impl("reference"), looks:
        looks.found.clear()
        if kind == "read":
            model.read(ids, attention_mask=mask)
        elif kind == "score":
            with torch.no_grad():
                model(ids, attention_mask=mask, labels=ids)
        elif kind == "train":
            model(ids, attention_mask=mask, labels=ids).loss.backward()
        return list(looks.found)


@pytest.mark.parametrize("static", [False, True], ids=["ordinary", "static-step"])
@pytest.mark.parametrize("kind", ["read", "score", "train"])
def test_nothing_is_looked_at_without_padding(kind: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(kind, 5, False, Looks(monkeypatch), static) == []


@pytest.mark.parametrize("kind", ["read", "score", "train"])
def test_padding_is_looked_at_once_per_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is any, where it lies in the segments, and where in their summaries: not once per segment."""
    looks = Looks(monkeypatch)
    few, many = (run(kind, segments, True, looks) for segments in (3, 9))
    assert few == many
    assert len(few) <= 4, few


@torch.no_grad()
def test_decoding_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside and across a segment's end; also where the open segment holds padding."""
    model = hmt_model()
    ids = token_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[1, 17:19] = 0
    states = [model(ids, use_cache=True).state, model(ids, attention_mask=mask, use_cache=True).state]
    with use_impl("reference"), Looks(monkeypatch) as looks:
        for _ in range(20):
            states = [model(ids[:, :1], state=state, use_cache=True, logits_to_keep=1).state for state in states]
            found, looks.found = looks.found, []
            closed = states[0].num_open == 0
            # a segment that is closed is read again, with a look at its padding and at that of its summary
            assert len(found) <= 2 * closed, found
    assert states[0].num_closed == 2


@pytest.mark.parametrize("scored", [False, True], ids=["read", "score"])
@torch.no_grad()
def test_reading_keeps_one_segment(scored: bool) -> None:
    """Nothing of a segment's size grows with the text, only its ids, its summary and its query."""
    model = hmt_model("llama-tied", segment_length=64, summary_batch_size=1)
    hidden_states = 64 * 64 * 4

    def read(segments: int) -> None:
        ids = token_ids(1, 64 * segments)
        if scored:
            model(ids, labels=ids)
        else:
            model.read(ids)

    few, many = peak_bytes(lambda: read(4)), peak_bytes(lambda: read(24))
    assert many - few < 20 * hidden_states / 3
