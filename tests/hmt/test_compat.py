"""hmt.compat where no recorded case reaches: long continuations, kept segments, labels that do not count, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from backbones import backbone, token_ids

from hmt.compat import CrossAttentionMemory, MemoryCell, RecurrentWrapper


def wrapper_of(**settings: object) -> RecurrentWrapper:
    torch.manual_seed(0)
    model = backbone()
    settings = {"segment_size": 16, "max_n_segments": 64, "mask_size": 20, "n_cell_out": 9, **settings}
    cell = MemoryCell(model, 1, 6)
    return RecurrentWrapper(cell, model.get_input_embeddings(), 64, 64, 3, **settings).eval()


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("length", [18, 40, 48])
def test_a_long_continuation_begins_as_a_short_one(length: int, alignment: str) -> None:
    """Up to segment_size - k new tokens come from one pass over the last segment, more from the recurrence."""
    wrapper = wrapper_of(segment_alignment=alignment)
    ids, greedy = token_ids(2, length), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    short, long = (wrapper.generate(ids, None, 16, max_new_tokens=count, **greedy) for count in (10, 30))
    parts = math.ceil(length / 16)
    last = {"left": length - 16 * (parts - 1), "right": 16, "center": length - math.ceil(length / parts) * (parts - 1)}
    same = min(10, 16 - last[alignment])  # tokens that the last segment still takes
    assert long.shape == (2, 30) and torch.equal(long[:, :same], short[:, :same])


@torch.no_grad()
def test_the_last_segments_are_kept_and_the_loss_is_of_the_last_labels() -> None:
    ids = token_ids(2, 70)
    whole, _ = wrapper_of()(ids, labels=ids, segment_size=16)
    kept, _ = wrapper_of(n_cell_out=2)(ids, labels=ids, segment_size=16, mask_size=9)
    assert torch.equal(kept.logits, whole.logits[:, 48:]) and {"logits_0", "logits_1"} == {
        name for name in kept if name.startswith("logits_")
    }
    for out, size in ((whole, 20), (kept, 9)):
        rows, labels = whole.logits[:, -size - 1 : -1], ids[:, -size:]
        loss = torch.nn.functional.cross_entropy(rows.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(out.ppl, loss.exp())


@torch.no_grad()
def test_hidden_states_are_those_of_the_logits() -> None:
    wrapper, ids = wrapper_of(), token_ids(2, 70)
    out, _ = wrapper(ids, labels=ids, segment_size=16, output_hidden_states=True)
    head = wrapper.memory_cell.model.get_output_embeddings()
    assert {layer.shape for layer in out.hidden_states} == {(2, 70, 64)}
    torch.testing.assert_close(head(out.hidden_states[-1]), out.logits)


@torch.no_grad()
def test_labels_that_do_not_count() -> None:
    """F1 and accuracy are of the others, token 0 among them; HMT-pytorch takes -100 for one more class."""
    wrapper, ids = wrapper_of(), token_ids(1, 40)
    predicted = wrapper(ids, labels=ids, segment_size=16)[0].logits[:, -17:-1].argmax(-1)
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = predicted[:, -4:]
    labels[:, -1] = 0
    right = float((labels[:, -4:] == predicted[:, -4:]).double().mean())
    out, _ = wrapper(ids, labels=labels, segment_size=16, mask_size=16)
    assert out.f1["accuracy"] == right and out.loss.isfinite()
    nothing, _ = wrapper(ids, labels=torch.full_like(ids, -100), segment_size=16)
    assert nothing.loss.isnan() and set(nothing.f1.values()) == {0.0}


def test_sizes_and_arguments_that_cannot_be_are_refused() -> None:
    wrapper, ids = wrapper_of(), token_ids(1, 40)
    with pytest.raises(ValueError, match="segment_size must be an integer >= 1, got 0"):
        wrapper(ids, segment_size=0)
    with pytest.raises(ValueError, match="segment_size must be an integer >= 1, got 0"):
        wrapper.generate(ids, None, 0, max_new_tokens=2)
    with pytest.raises(ValueError, match="extra_size must be an integer >= 0, got -16"):
        wrapper(ids, segment_size=16, extra_size=-16, switch_at=0)
    with pytest.raises(TypeError, match="takes token ids, and no inputs_embeds"):
        wrapper.memory_cell(ids, inputs_embeds=torch.zeros(1, 40, 64))


@torch.no_grad()
@pytest.mark.parametrize("count", [4, 30])
def test_generation_takes_its_own_scale(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of wide recall is another than in a forward pass."""
    asked: list[bool] = []
    scale = CrossAttentionMemory.scale
    monkeypatch.setattr(
        CrossAttentionMemory, "scale", lambda self, generate: asked.append(generate) or scale(self, generate)
    )
    wrapper, ids = wrapper_of(), token_ids(1, 40)
    wrapper.generate(ids, None, 16, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert asked and all(asked)
    asked.clear()
    wrapper(ids, labels=ids, segment_size=16)
    assert asked and not any(asked)
