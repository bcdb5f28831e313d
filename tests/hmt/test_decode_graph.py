"""Decoding through fixed buffers gives the tokens of the ordinary path, whoever else decodes; on CPU, on a tape."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from backbones import hmt_model, token_ids

from hmt import HMTForCausalLM, capture, decode_graph

pytestmark = pytest.mark.usefixtures("as_captured")


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The position of every token that goes through buffers."""
    taken: list[int] = []
    run = decode_graph.DecodeGraph.run

    def watched(graph, cache, embeds):
        taken.append(cache.get_seq_length())
        return run(graph, cache, embeds)

    monkeypatch.setattr(decode_graph.DecodeGraph, "run", watched)
    return taken


def pair(name: str = "llama", **settings: object) -> tuple[HMTForCausalLM, HMTForCausalLM]:
    """The same model with graphs and without."""
    ours, theirs = (hmt_model(name, cuda_graphs=on, **settings) for on in (True, False))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# in windows shorter than a segment and in states, not all keys are kept
FULL = ["llama", "qwen3", "opt-projected", "gpt2", "gpt-neox", "phi3"]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", [*FULL, "mistral-window", "gemma3", "mamba"])
@torch.no_grad()
def test_generation(name: str, rows: int, tokens: list) -> None:
    ours, theirs = pair(name)
    ids = token_ids(rows, 21)
    assert torch.equal(ours.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))
    # one token of each segment closes it, the next one opens another
    assert len(tokens) == (0 if name not in FULL else 40 - 1 - 2 * 2)


@torch.no_grad()
def test_beam_search_reorders_keys(tokens: list) -> None:
    """Which puts the chosen rows into memory of their own."""
    ours, theirs = pair()
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(ours.generate(token_ids(2, 21), **beams), theirs.generate(token_ids(2, 21), **beams))
    assert tokens


class Text:
    """A text with its state, as one model reads it."""

    def __init__(self, model: HMTForCausalLM, seed: int):
        self.model = model
        out = model(token_ids(1, 21 + seed, seed=seed), use_cache=True)
        self.state, self.ids = out.state, out.logits[:, -1:].argmax(-1)

    def next(self) -> torch.Tensor:
        out = self.model(self.ids, state=self.state, use_cache=True)
        self.state, self.ids = out.state, out.logits[:, -1:].argmax(-1)
        return out.logits


@torch.no_grad()
def test_texts_take_turns(tokens: list) -> None:
    """Keys move out for another text, and back in."""
    models = pair()
    ours, theirs = ([Text(model, seed) for seed in (0, 1, 2)] for model in models)
    for turn in (0, 1, 1, 0, 2, 0, 1, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1):
        torch.testing.assert_close(ours[turn].next(), theirs[turn].next(), atol=1e-5, rtol=1e-5)
    assert len(tokens) > 12


@torch.no_grad()
def test_one_state_is_continued_twice(tokens: list) -> None:
    """The second continuation finds a longer cache than it had, and reads its segment again."""
    models = pair()
    ours, theirs = (Text(model, 0) for model in models)
    states = ours.state, theirs.state
    for _ in range(3):
        torch.testing.assert_close(ours.next(), theirs.next(), atol=1e-5, rtol=1e-5)
    again = [
        model(token_ids(1, 1, seed=9), state=state, use_cache=True).logits
        for model, state in zip(models, states, strict=True)
    ]
    torch.testing.assert_close(*again, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.next(), theirs.next(), atol=1e-5, rtol=1e-5)
    assert tokens


@torch.no_grad()
def test_another_model_goes_on_with_its_own_weights() -> None:
    first, second = pair()
    other, plain = pair()
    for model in (other, plain):
        for p in model.backbone.model.layers.parameters():
            p.mul_(1.1)
    logits = []
    for model, after in ((first, other), (second, plain)):
        text = Text(model, 0)
        text.next()
        text.model = after
        logits.append(text.next())
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copied_state_goes_on_by_itself() -> None:
    models = pair()
    ours, theirs = (Text(model, 0) for model in models)
    for _ in range(2):
        ours.next(), theirs.next()
    twins = [copy.copy(text) for text in (ours, theirs)]
    for twin in twins:
        twin.state = copy.deepcopy(twin.state)
    for text in ((ours, theirs), twins, (ours, theirs), twins):
        torch.testing.assert_close(*(x.next() for x in text), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_in_the_open_segment_takes_the_ordinary_path(tokens: list) -> None:
    ours, theirs = pair()
    ids = token_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[1, 17:19] = 0
    logits = []
    for model in (ours, theirs):
        out = model(ids, attention_mask=mask, use_cache=True)
        logits.append(model(ids[:, :1], state=out.state, use_cache=True).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert not tokens


@torch.no_grad()
def test_by_itself_a_model_captures_after_a_few_tokens(tokens: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "not_here", lambda model: None)
    ours, theirs = pair()
    ours.config.cuda_graphs = None
    ids = token_ids(1, 16)
    assert torch.equal(ours.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))
    # of a segment's 16 tokens one opens it and one closes it; the last segment has eight
    assert len(tokens) == 2 * (16 - 2 - capture.USES_BEFORE) + max(0, 8 - 2 - capture.USES_BEFORE)


@torch.no_grad()
def test_nothing_of_a_text_that_is_gone_is_kept() -> None:
    ours, _ = pair()
    first = Text(ours, 0)
    first.next()
    count = len(decode_graph._decodings)
    del first
    gc.collect()
    assert len(decode_graph._decodings) < count
    second = Text(ours, 1)
    second.next()  # nothing moves out


def test_gradients_are_recorded_without(tokens: list) -> None:
    ours, _ = pair()
    state = ours(token_ids(1, 21), use_cache=True).state
    assert ours(token_ids(1, 1), state=state, use_cache=True).logits.requires_grad and not tokens


def moved(model: HMTForCausalLM) -> None:
    for p in model.parameters():
        p.data = p.data * 1.1


def assigned(model: HMTForCausalLM) -> None:
    model.load_state_dict({name: p * 1.1 for name, p in model.state_dict().items()}, assign=True)


def hooked(model: HMTForCausalLM) -> None:
    model.backbone.model.layers[0].register_forward_hook(lambda module, given, out: out * 0.5)


def adapted(model: HMTForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("change", [moved, assigned, hooked, adapted])
@torch.no_grad()
def test_a_model_that_changes_within_a_segment(change: Callable, tokens: list) -> None:
    ours, theirs = (Text(model, 0) for model in pair())
    for _ in range(2):
        torch.testing.assert_close(ours.next(), theirs.next(), atol=1e-5, rtol=1e-5)
    for text in (ours, theirs):
        change(text.model)
    for _ in range(2):
        torch.testing.assert_close(ours.next(), theirs.next(), atol=1e-5, rtol=1e-5)
    assert len(tokens) == (4 if change in (moved, assigned) else 2)


@torch.no_grad()
def test_autocast_within_a_segment() -> None:
    ours, theirs = (Text(model, 0) for model in pair())
    for on in (False, True, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            torch.testing.assert_close(ours.next(), theirs.next(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 0, 1, 2]], ids=["fewer", "more"])
@torch.no_grad()
def test_rows_are_selected_within_a_segment(rows: list[int]) -> None:
    logits = []
    for model in pair():
        state = model(token_ids(3, 21), use_cache=True).state
        state = model(token_ids(3, 1), state=state, use_cache=True).state
        state.reorder_cache(torch.tensor(rows))
        logits.append(model(token_ids(3, 1, seed=5)[rows], state=state, use_cache=True).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_another_text_in_inference_mode() -> None:
    """Keys that move out for it can still be written to."""
    model, _ = pair()
    first, second = Text(model, 0), Text(model, 1)
    first.next()
    with torch.inference_mode():
        second.next()
    model.config.cuda_graphs = False
    first.next()
