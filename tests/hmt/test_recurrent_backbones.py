"""Backbones without attention (Mamba, RWKV): hidden positions leave no trace, caches know their length."""

from __future__ import annotations

import pytest
import torch
from backbones import WITHOUT_ATTENTION, backbone, hmt_model, token_ids
from test_generation import GREEDY

from hmt.backbone import _cache_argument, embed, run_layers
from hmt.compat import MemoryCell, RecurrentWrapper
from hmt.kv_cache import new_cache

without_attention = pytest.mark.parametrize("name", WITHOUT_ATTENTION)


@without_attention
@torch.no_grad()
def test_a_hidden_position_is_as_if_it_were_not_there(name: str) -> None:
    """Before, between and after visible ones, in every layer; under transformers' own mask the state decays there."""
    model = backbone(name)
    embeds = embed(model, token_ids(3, 12))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 2:7] = False
    mask[1, :3] = mask[1, 5] = mask[1, 10:] = False
    out = run_layers(model, embeds, mask, output_hidden_states=True)
    last_rows = run_layers(model, embeds, mask, last_rows=4).last_hidden_state
    assert torch.equal(last_rows, out.last_hidden_state[:, -4:])
    for row in range(3):
        seen = mask[row]
        alone = run_layers(model, embeds[row : row + 1, seen], output_hidden_states=True)
        torch.testing.assert_close(out.last_hidden_state[row, seen], alone.last_hidden_state[0], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, seen], theirs[0], atol=1e-5, rtol=1e-5)


@without_attention
def test_a_batch_padded_on_the_right_trains_as_its_rows_do(name: str) -> None:
    """Gradients of a batch of texts of different lengths are those of each text on its own; Mamba scans in float32."""
    model = hmt_model(name).double()
    ids = token_ids(3, 16 * 3)
    lengths = (48, 39, 20)
    mask = torch.arange(48)[None] < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, -100)
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=1).loss.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, length in enumerate(lengths):
        text = ids[row : row + 1, :length]
        model(text, labels=text, num_items_in_batch=1).loss.backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            error = (together[n] - p.grad).norm() / p.grad.norm().clamp(min=1e-30)
            assert error < 1e-6, f"{n}: relative error {error:.1e}"


@without_attention
@torch.no_grad()
def test_padded_prompts_and_beams_generate_as_alone(name: str) -> None:
    """Rows padded on the left, whose open segment keeps no cache, then beams, whose caches are reordered."""
    model = hmt_model(name, summary_source="previous")
    ids = token_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :16] = 0  # a whole segment: what follows stands where it would alone, but for the memory of nothing
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY)
    alone = model.generate(ids[:1], max_new_tokens=20, **GREEDY)
    assert torch.equal(batch[:1], alone)
    uncached = model.generate(ids, attention_mask=mask, max_new_tokens=20, use_cache=False, **GREEDY)
    assert torch.equal(batch, uncached)
    beams = [model.generate(ids, max_new_tokens=12, num_beams=3, use_cache=on, **GREEDY) for on in (True, False)]
    assert torch.equal(*beams)


@without_attention
@torch.no_grad()
def test_a_state_that_was_continued_can_be_continued_otherwise(name: str) -> None:
    """A cache that has moved on is noticed by its length; padding keeps none."""
    model = hmt_model(name)
    state = model(token_ids(1, 40), use_cache=True).state
    assert (state.cache is not None) == (name != "rwkv")
    steps = [model(token_ids(1, 1, seed=n), state=state, use_cache=True).logits for n in (3, 4, 3)]
    torch.testing.assert_close(steps[0], steps[2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(steps[0], steps[1])
    assert new_cache(model.backbone, 20, padded=True) is None


def test_a_cache_is_found_by_the_names_that_versions_of_transformers_give_it() -> None:
    assert _cache_argument(lambda cache=None, **_: None) == "cache"
    assert _cache_argument(lambda past_key_values=None, **_: None) == "past_key_values"
    assert _cache_argument(lambda cache_params=None, **_: None) == "cache_params"
    assert _cache_argument(lambda state=None, **_: None) is None


@torch.no_grad()
def test_compat_classes_take_them() -> None:
    """The drop-in wrapper gives the logits of the model with the same weights."""
    torch.manual_seed(0)
    lm = backbone("mamba")
    cell = MemoryCell(lm, 1, 3)
    wrapper = RecurrentWrapper(cell, lm.get_input_embeddings(), 64, 64, 3, segment_size=16, mask_size=40, n_cell_out=9)
    ids = token_ids(2, 60)
    out, _ = wrapper(ids, labels=ids, segment_size=16)
    torch.testing.assert_close(out.logits, wrapper.to_hmt(16)(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "llama"])
@torch.no_grad()
def test_a_pass_that_breaks_off_can_be_tried_again(name: str) -> None:
    """By then the first layers have seen the token, and the last has not."""
    model, ids = hmt_model(name, summary_source="previous"), token_ids(1, 21)
    state = model(ids[:, :20], use_cache=True).state
    expected = model(ids[:, 20:], state=state.without_cache(), use_cache=True).logits

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    *_, last = (module for module in model.backbone.modules() if "Norm" in type(module).__name__)
    handle = last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 20:], state=state, use_cache=True)
    handle.remove()
    torch.testing.assert_close(model(ids[:, 20:], state=state, use_cache=True).logits, expected, atol=1e-5, rtol=1e-5)
