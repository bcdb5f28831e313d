"""What every backbone must keep: no leak from later tokens, the same results in any padding, batch, cut and repeat.

In float64, so that nothing but a fault can exceed the bounds; bfloat16 and repeats in their own dtype.
"""

from __future__ import annotations

import pytest
import torch
from backbones import CONFIGS, VOCAB, hmt_model, token_ids
from test_model import plain_recurrence
from tolerance import assert_accurate

from hmt import HMTForCausalLM

LENGTH, SUMMARY = 16, 8  # tokens of a segment, and of it those that its summary reads

every_backbone = pytest.mark.parametrize("name", CONFIGS)


def exact_model(name: str, **settings: object) -> HMTForCausalLM:
    return hmt_model(name, **settings).double()


@every_backbone
@pytest.mark.parametrize("source", ["previous", "current"])
@torch.no_grad()
def test_no_leak_from_a_later_token(name: str, source: str) -> None:
    """Exactly zero; by default, a token that the summary reads may change its segment from the start, none other."""
    model = hmt_model(name, summary_source=source)
    ids = token_ids(1, LENGTH * 4 + 9)
    before = model(ids).logits
    for segment, place in ((0, 3), (2, SUMMARY - 1), (2, SUMMARY), (2, LENGTH - 1), (4, SUMMARY)):
        position = segment * LENGTH + place
        summarised = source == "current" and segment > 0 and place < SUMMARY
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        moved = (model(changed).logits - before).abs().amax(-1)[0]
        first = segment * LENGTH if summarised else position
        assert not moved[:first].any(), f"token {position} changes an earlier logit"
        assert moved[position] > 0


@every_backbone
@torch.no_grad()
def test_padding_does_not_matter(name: str) -> None:
    """A row padded on the right has the logits it has alone; what stands in padded places changes nothing."""
    model = exact_model(name)
    ids, lengths = token_ids(3, LENGTH * 3 + 5), (LENGTH * 3 + 5, LENGTH * 2 + 3, LENGTH * 3 - 1)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    padded = model(ids, attention_mask=mask.long()).logits
    other = model(torch.where(mask, ids, (ids + 1) % VOCAB), attention_mask=mask.long()).logits
    torch.testing.assert_close(other[mask], padded[mask], atol=1e-6, rtol=0)
    for row, length in enumerate(lengths):
        full = length // LENGTH * LENGTH  # a summary of an open segment reads what is there of it
        alone = model(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(padded[row, :full], alone[:full], atol=1e-6, rtol=0)


@every_backbone
@torch.no_grad()
def test_rows_of_a_batch_do_not_matter_to_each_other(name: str) -> None:
    model = exact_model(name)
    ids = token_ids(4, LENGTH * 5 + 7)
    together = model(ids, output_trace=True)
    for row in range(4):
        alone = model(ids[row : row + 1], output_trace=True)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-9, rtol=0)
        assert torch.equal(together.trace["age"][row], alone.trace["age"][0])


@every_backbone
@torch.no_grad()
def test_parts_and_single_tokens_are_the_whole(name: str) -> None:
    """In the causal mode, where decoding equals teacher forcing."""
    model = exact_model(name, summary_source="previous")
    ids = token_ids(2, LENGTH * 4 + 6)
    whole = model(ids)
    for cuts in ((1, 15, 16, 17, 40), (33,), range(1, ids.shape[1])):
        state, logits = None, []
        for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            out = model(ids[:, start:stop], state=state, use_cache=True)
            state, logits = out.state, [*logits, out.logits]
        torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(state.memories(), whole.state.memories(), atol=1e-5, rtol=0)


@every_backbone
@torch.no_grad()
def test_bfloat16_errs_no_more_than_a_plain_loop(name: str) -> None:
    """Against float64, at most twice the error of the definition in bfloat16 (tests/tolerance.py)."""
    model = exact_model(name)
    ids = token_ids(2, LENGTH * 3)
    exact, _ = plain_recurrence(model, ids)
    model = model.bfloat16()
    rounded, _ = plain_recurrence(model, ids)
    assert_accurate(model(ids).logits, rounded, exact, "logits")


@every_backbone
@torch.no_grad()
def test_twenty_repeats_give_the_same_bits(name: str) -> None:
    model, ids = hmt_model(name), token_ids(2, LENGTH * 2 + 5)
    first = model(ids)
    for _ in range(20):
        again = model(ids)
        assert torch.equal(again.logits, first.logits) and torch.equal(again.state.queue, first.state.queue)


def test_twenty_gradients_are_the_same_bits() -> None:
    """One backbone: what is ours in the backward pass is the same for all."""
    model, ids = hmt_model(), token_ids(2, LENGTH * 2 + 5)
    parameters = [model.memory, model.recall.wk.weight, model.backbone.lm_head.weight]
    first = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    for _ in range(20):
        again = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
