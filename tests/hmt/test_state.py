"""States outlive the process: saved and continued, damaged files refused, stacked, split and moved."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
import torch
from backbones import hmt_model, token_ids
from safetensors.torch import load_file, save_file

from hmt import HMTForCausalLM, HMTState


def padded_state(model: HMTForCausalLM) -> HMTState:
    ids = token_ids(2, 16 * 4 + 5)
    mask = torch.ones_like(ids)
    mask[1, 60:66] = 0  # in the recent and in the open segment
    return model.read(ids, attention_mask=mask)


def assert_equal(actual: HMTState, expected: HMTState) -> None:
    assert actual.num_closed == expected.num_closed
    assert (actual.queue is None) == (expected.queue is None)
    if expected.queue is not None:
        assert actual.queue.dtype == expected.queue.dtype
        assert torch.equal(actual.queue, expected.queue)
    for name in ("recent", "open"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.visible(), theirs.visible())


@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@torch.no_grad()
def test_a_saved_state_is_continued(mode: str, padded: bool, tmp_path: Path) -> None:
    model = hmt_model(mode=mode, summary_source="previous")
    state = padded_state(model) if padded else model(token_ids(2, 16 * 4 + 5), use_cache=True).state
    state.save(tmp_path / "book.hmt")
    loaded = HMTState.load(tmp_path / "book.hmt")
    assert_equal(loaded, state)
    ids = token_ids(2, 40, seed=1)
    a, b = model(ids, state=state), model(ids, state=loaded)
    assert torch.equal(a.logits, b.logits)
    assert_equal(b.state, a.state)
    assert os.listdir(tmp_path) == ["book.hmt"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_empty_parts(dtype: torch.dtype, tmp_path: Path) -> None:
    model = hmt_model().to(dtype)
    for state in (model.new_state(3), model.read(token_ids(1, 16 * 3))):
        state.save(tmp_path / "state")
        assert_equal(HMTState.load(str(tmp_path / "state")), state)


def test_gradients_are_not_saved(tmp_path: Path) -> None:
    model = hmt_model()
    state = model(token_ids(1, 40)).state
    assert state.queue.requires_grad
    state.save(tmp_path / "state")
    assert not HMTState.load(tmp_path / "state").queue.requires_grad
    assert not state.detach().queue.requires_grad


def test_every_flip_and_truncation_is_noticed_or_harmless(tmp_path: Path) -> None:
    model = hmt_model()
    state = padded_state(model)
    path = tmp_path / "state"
    state.save(path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    draw = random.Random(0)
    refused = 0
    for number in range(250):
        data = bytearray(good)
        if number < 100:  # a bit of the header, where the metadata is
            data[draw.randrange(header)] ^= 1 << draw.randrange(8)
        elif number < 200:  # a bit of the tensors
            data[draw.randrange(header, len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            loaded = HMTState.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert_equal(loaded, state)
    assert refused >= 240  # what is left can only be the padding of the header


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "no safetensors file"),
        (lambda path: path.write_text("Call me Ishmael. " * 100), "no safetensors file"),
        (lambda path: torch.save({"queue": torch.zeros(2)}, path), "no safetensors file"),
        (lambda path: save_file({"queue": torch.zeros(2)}, path), "holds no HMT state"),
        (lambda path: _rewrite(path, version="2"), "format version '2', this hmt reads '1'"),
        (lambda path: _rewrite(path, num_closed="77"), "metadata does not match"),
        (lambda path: _rewrite(path, drop="queue"), "it should hold"),
        (lambda path: _rewrite(path, change="open.ids"), "'open.ids' does not match its SHA-256"),
    ],
    ids=["empty", "text", "pickle", "weights", "version", "metadata", "missing", "changed"],
)
def test_refused_files(write, message: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    hmt_model().read(token_ids(1, 40)).save(path)
    write(path)
    with pytest.raises(ValueError, match=message):
        HMTState.load(path)


def _rewrite(path: Path, drop: str | None = None, change: str | None = None, **metadata: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        known = file.metadata()
    tensors = load_file(path)
    if drop:
        del tensors[drop]
    if change:
        tensors[change][0, 0] += 1
    save_file(tensors, path, {**known, **metadata})


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        HMTState.load(tmp_path / "nothing")


def test_a_file_that_cannot_be_written_is_named_as_given(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "state"
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(path)))):
        hmt_model().read(token_ids(1, 40)).save(path)


def test_links_and_long_names_are_written_to(tmp_path: Path) -> None:
    state = hmt_model().read(token_ids(1, 40))
    target, link = tmp_path / ("n" * 255), tmp_path / "link"
    state.save(target)
    link.symlink_to(target)
    longer = hmt_model().read(token_ids(1, 70))
    longer.save(link)
    assert link.is_symlink()
    assert_equal(HMTState.load(target), longer)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hmt_model()
    path = tmp_path / "state"
    old = model.read(token_ids(1, 40))
    old.save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        model.read(token_ids(1, 70)).save(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["state"]
    assert_equal(HMTState.load(path), old)


@torch.no_grad()
def test_stack_and_split_are_inverse() -> None:
    model = hmt_model(summary_source="previous")
    states = [model.read(token_ids(1, 53, seed=n)) for n in range(3)]
    mask = torch.ones(1, 53, dtype=torch.long)
    mask[0, 50:] = 0
    states.append(model.read(token_ids(1, 53, seed=3), attention_mask=mask))
    together = HMTState.stack(states)
    for one, again in zip(states, together.split(), strict=True):
        assert_equal(again, one)
    ids = token_ids(4, 30, seed=9)
    out = model(ids, state=together)
    for row, state in enumerate(states):
        alone = model(ids[row : row + 1], state=state)
        torch.testing.assert_close(out.logits[row : row + 1], alone.logits, atol=1e-5, rtol=1e-5)
    assert_equal(together.select_rows(torch.tensor([2, 0])), HMTState.stack([states[2], states[0]]))


def test_states_at_different_positions_do_not_stack() -> None:
    model = hmt_model()
    with pytest.raises(ValueError, match="num_open"):
        HMTState.stack([model.read(token_ids(1, 40)), model.read(token_ids(1, 41))])
    with pytest.raises(ValueError, match="at least one"):
        HMTState.stack([])


@torch.no_grad()
def test_another_dtype() -> None:
    model = hmt_model(summary_source="previous")
    state = model(token_ids(2, 40), use_cache=True).state
    half = state.to(torch.bfloat16)
    with pytest.raises(TypeError, match="device must come before dtype"):
        state.to(torch.bfloat16, torch.float32)
    assert half.queue.dtype == torch.bfloat16 and half.open.ids.dtype == torch.int64 and half.cache is None
    ids = token_ids(2, 20, seed=1)
    low = HMTForCausalLM.from_backbone(model.backbone, segment_length=16, num_sensory=3, queue_size=3)
    low.load_state_dict(model.state_dict())
    a, b = model(ids, state=state).logits, model(ids, state=half).logits
    assert (a - b).norm() < 0.02 * a.norm() and not torch.equal(a, b)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"name": "opt-projected"}, "width 64"),
        ({"mode": "rmt"}, "mode 'rmt'"),
        ({"mode": "baseline"}, "mode 'baseline'"),
        ({"segment_length": 8}, "segment_length"),
        ({"summary_source": "previous"}, "last 3 tokens .* summarises 8 .* with the summary_source"),
    ],
    ids=["width", "rmt", "baseline", "segments", "previous"],
)
def test_a_state_of_another_model_is_refused(other: dict, message: str) -> None:
    state = hmt_model().read(token_ids(1, 16 * 2 + 12))
    model = hmt_model(**other)
    for run in (model.forward, model.read):
        with pytest.raises(ValueError, match=message):
            run(token_ids(1, 4), state=state)


@torch.no_grad()
def test_the_queue_has_the_size_it_was_made_with() -> None:
    """A state with a longer queue than the model's own is continued with that queue."""
    state = hmt_model(queue_size=5).read(token_ids(2, 16 * 7))
    ids = token_ids(2, 16 * 6, seed=1)
    out = hmt_model(queue_size=3)(ids, state=state)
    expected = hmt_model(queue_size=5)(ids, state=state)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.state.memories(), expected.state.memories())


@torch.no_grad()
def test_a_state_is_shown_by_what_it_has_read() -> None:
    model = hmt_model()
    state = model(token_ids(2, 40), use_cache=True).state
    shown = "HMTState(batch_size=2, num_closed=2, num_open=8, queue=[2, 3, 64] torch.float32 on cpu, cached)"
    assert repr(state) == shown and repr(state.without_cache()) == shown.replace(", cached", "")
    assert "queue=none" in repr(hmt_model(mode="baseline").new_state())
    assert state in [model.new_state(2), state] and state.without_cache() != state
