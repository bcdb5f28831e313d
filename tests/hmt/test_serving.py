"""Documents at different positions in one call: each result is that of reading the document alone."""

from __future__ import annotations

import random

import pytest
import torch
from backbones import VOCAB, hmt_model, token_ids
from test_generation import GREEDY

from hmt import HMTForCausalLM, HMTState
from hmt.kv_cache import SegmentCache, claimed
from hmt.serving import step


class Alone:
    """A document read by the model itself, next to its place in the batch."""

    def __init__(self, model: HMTForCausalLM, ids: torch.Tensor):
        self.model = model
        self.state = model.read(ids[None]) if len(ids) else model.new_state()

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(ids[None], state=self.state, use_cache=True)
        self.state = out.state
        return out.logits[0]


def assert_states_agree(states: list[HMTState], documents: list[Alone]) -> None:
    for state, document in zip(states, documents, strict=True):
        expected = document.state
        assert (state.num_closed, state.num_open) == (expected.num_closed, expected.num_open)
        assert torch.equal(state.open.ids, expected.open.ids)
        if expected.queue is not None:
            torch.testing.assert_close(state.queue, expected.queue, atol=1e-5, rtol=1e-5)


BACKBONES = ["llama", "mistral-window", "opt-projected", "gpt2", "gpt-neox", "gemma2", "gemma3", "mamba", "rwkv"]
CASES = [*((name, "hmt", "current") for name in BACKBONES), ("llama", "hmt", "previous"), ("qwen3", "rmt", "current"),
         ("llama", "baseline", "current")]  # fmt: skip


@pytest.mark.parametrize(("name", "mode", "source"), CASES)
@torch.no_grad()
def test_each_row_is_its_document_alone(name: str, mode: str, source: str) -> None:
    """A random mix of single tokens, pieces and whole segments, so that rows open and close at different times."""
    model = hmt_model(name, mode=mode, summary_source=source)
    draw = random.Random(1)
    texts = [token_ids(1, 900, seed=n)[0] for n in range(4)]
    at = [0, 7, 31, 64]
    documents = [Alone(model, text[:n]) for text, n in zip(texts, at, strict=True)]
    states = [document.state for document in documents]
    for _ in range(24):
        takes = [draw.choice((1, 1, 1, 1, 1, 5, 40)) for _ in texts]
        tokens = [text[n : n + take] for text, n, take in zip(texts, at, takes, strict=True)]
        keep = draw.choice((0, 1, 3))
        logits, states = step(model, states, tokens, logits_to_keep=keep)
        for ours, document, ids in zip(logits, documents, tokens, strict=True):
            theirs = document.take(ids)[-keep:]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        at = [n + take for n, take in zip(at, takes, strict=True)]
    assert_states_agree(states, documents)
    assert max(s.num_closed for s in states) > 6


@torch.no_grad()
def test_rows_decode_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the same rows go on, their keys stay where they are; one pass of the backbone per token of all."""
    model = hmt_model(segment_length=32)
    states = [model.read(token_ids(1, n, seed=n)) for n in (5, 40, 71)]
    _, states = step(model, states, [token_ids(1, 3, seed=n)[0] for n in range(3)])
    calls = []
    model.backbone.model.register_forward_pre_hook(lambda *_: calls.append(1))
    buffers = {state.cache.layers[0].keys.data_ptr() for state in states}
    for n in range(10):
        _, states = step(model, states, [token_ids(1, 1, seed=n)[0]] * 3)
    assert len(calls) == 10
    assert {state.cache.layers[0].keys.data_ptr() for state in states} == buffers
    assert all(isinstance(state.cache, SegmentCache) for state in states)


@torch.no_grad()
def test_rows_come_and_go() -> None:
    """Other rows, another order, a row twice: the batch is put together anew and nothing of the old one is touched."""
    model = hmt_model(segment_length=32, summary_source="previous")
    documents = [Alone(model, token_ids(1, n, seed=n)[0]) for n in (5, 40, 71)]
    starts = [token_ids(1, 3, seed=n)[0] for n in range(3)]
    _, states = step(model, [d.state for d in documents], starts)
    for document, ids in zip(documents, starts, strict=True):
        document.take(ids)
    kept = [document.state for document in documents]
    token = token_ids(1, 1, seed=9)[0]
    for order in ([2, 0], [1, 1, 0], [0, 1, 2]):
        logits, _ = step(model, [states[i] for i in order], [token] * len(order))
        for i, row in zip(order, logits, strict=True):
            alone = model(token[None], state=kept[i].without_cache(), use_cache=True)
            torch.testing.assert_close(row, alone.logits[0], atol=1e-5, rtol=1e-5)
    for i, state in enumerate(states):  # a row goes on alone, outside of any batch
        alone = model(token[None], state=kept[i].without_cache(), use_cache=True)
        out = model(token[None], state=state, use_cache=True)
        torch.testing.assert_close(out.logits, alone.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@torch.no_grad()
def test_one_state_continued_in_several_ways(name: str) -> None:
    """Several rows may continue the same state: what was decoded before, with the recall of that time, is copied."""
    model = hmt_model(name, segment_length=32)
    document = Alone(model, token_ids(1, 40)[0])
    start, tokens = token_ids(1, 3, seed=1)[0], [token_ids(1, 1, seed=n)[0] for n in (1, 2, 3)]
    expected = []
    for token in tokens:
        fork = Alone(model, token_ids(1, 40)[0])
        fork.take(start)
        expected.append(fork.take(token))
    document.take(start)
    logits, states = step(model, [document.state] * 3, tokens)
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len({id(state.cache) for state in states}) == 3


@torch.no_grad()
def test_states_with_padding() -> None:
    """A state whose open segment has hidden tokens is continued among others."""
    model = hmt_model()
    ids = token_ids(1, 40)
    mask = torch.ones_like(ids)
    mask[0, 34:37] = 0
    states = [model.read(ids, attention_mask=mask), model.read(ids)]
    documents = [Alone(model, ids[0, :0]) for _ in states]
    for document, state in zip(documents, states, strict=True):
        document.state = state
    for n in range(12):
        tokens = [token_ids(1, 1, seed=n)[0]] * 2
        logits, states = step(model, states, tokens)
        for ours, document in zip(logits, documents, strict=True):
            torch.testing.assert_close(ours, document.take(tokens[0]), atol=1e-5, rtol=1e-5)
    assert_states_agree(states, documents)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
@torch.no_grad()
def test_generate_from_states_at_different_positions(name: str) -> None:
    """One call of transformers' generate(); every row's text is what it would be alone."""
    model = hmt_model(name)
    lengths, prompts = (3, 25, 48, 64), (4, 9, 1, 20)
    books = [token_ids(1, n, seed=n) for n in lengths]
    questions = [token_ids(1, n, seed=100 + n) for n in prompts]
    states = [model.read(book) for book in books]
    widest = max(prompts)
    ids = torch.cat([torch.nn.functional.pad(q, (widest - q.shape[1], 0)) for q in questions])
    mask = torch.tensor([[0] * (widest - n) + [1] * n for n in prompts])
    tokens = model.generate(ids, attention_mask=mask, state=states, max_new_tokens=40, **GREEDY)
    for row, (state, question) in enumerate(zip(states, questions, strict=True)):
        alone = model.generate(question, state=state, max_new_tokens=40, **GREEDY)
        assert torch.equal(tokens[row, widest:], alone[0, question.shape[1] :])


@torch.no_grad()
def test_sampling_and_beams_from_a_list_of_states() -> None:
    model = hmt_model(summary_source="previous")
    states = [model.read(token_ids(1, n)) for n in (10, 20)]
    ids = token_ids(2, 4, seed=1)
    options = {"state": states, "max_new_tokens": 12, **GREEDY}
    sampled = model.generate(ids, **{**options, "do_sample": True, "top_k": 4, "num_return_sequences": 3})
    assert sampled.shape == (6, 16) and len({tuple(row) for row in sampled.tolist()}) > 3
    out = model.generate(
        ids, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True, **options
    )
    for row, state in enumerate(states):
        logits = model(out.sequences[row : row + 1], state=state).logits.log_softmax(-1)
        chosen = logits[0, 3:-1].gather(1, out.sequences[row, 4:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row], chosen, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"states": []}, ValueError, "at least one"),
        ({"tokens": [torch.tensor([1])]}, ValueError, "as many"),
        ({"tokens": [torch.tensor([1]), torch.tensor([], dtype=torch.long)]}, ValueError, "t >= 1"),
        ({"tokens": [torch.tensor([1]), torch.tensor([[1]])]}, ValueError, "tokens must be integer tensors"),
        ({"tokens": [torch.tensor([1]), [1]]}, TypeError, "list at 1"),
        ({"states": 2}, ValueError, "one row each"),
        ({"states": "other"}, ValueError, "queues of one shape"),
        ({"logits_to_keep": -1}, ValueError, "logits_to_keep"),
    ],
    ids=["none", "numbers", "empty", "shape", "type", "rows", "queues", "keep"],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    model = hmt_model()
    states = {2: [model.new_state(2)] * 2, "other": [model.new_state(), hmt_model(queue_size=7).new_state()]}
    arguments = {"states": [model.new_state()] * 2, "tokens": [torch.tensor([1])] * 2, **arguments}
    if not isinstance(arguments["states"], list):
        arguments["states"] = states[arguments["states"]]
    with pytest.raises(error, match=message):
        step(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.ones(2, 3, dtype=torch.long), "logits_to_keep": 1}, "takes no labels"),
        ({}, "logits_to_keep >= 1"),
        ({"state": "three", "logits_to_keep": 1}, "3 states"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]]), "logits_to_keep": 1}, "every row"),
    ],
    ids=["labels", "keep", "rows", "empty-row"],
)
def test_bad_lists_of_states(arguments: dict, message: str) -> None:
    model = hmt_model()
    count = 3 if arguments.pop("state", None) else 2
    with pytest.raises(ValueError, match=message):
        model(token_ids(2, 3) % VOCAB, state=[model.new_state() for _ in range(count)], **arguments)


@torch.no_grad()
def test_a_cache_that_another_thread_is_writing_to_is_left_alone() -> None:
    """One state may be continued by several at once: whoever comes second reads its open segment again."""
    model, ids = hmt_model(summary_source="previous"), token_ids(3, 25)
    token = ids[:, 24:]
    states = model(ids[:, :24], use_cache=True).state.split()
    _, states = step(model, [s.without_cache() for s in states], [row[20:21] for row in ids])
    expected, _ = step(model, [s.without_cache() for s in states], list(token))
    lengths = [s.cache.get_seq_length() for s in states]
    with claimed(states[0].cache) as first, claimed(states[2].cache) as last, claimed(states[0].cache) as again:
        assert (first, last, again) == (True, True, False)
        alone = model(token[:1], state=states[0], use_cache=True).logits[0]
        found, after = step(model, states, list(token))
        copies, _ = step(model, [states[0], states[0]], [token[0], token[0]])
    torch.testing.assert_close(alone, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(copies, [expected[0]] * 2, atol=1e-5, rtol=1e-5)
    now = [s.cache.get_seq_length() for s in states]
    assert now == [lengths[0], lengths[1] + 1, lengths[2]] and after[1].cache is states[1].cache
    with claimed(states[0].cache) as free:
        assert free


@torch.no_grad()
def test_two_rows_that_continue_one_state_do_not_share_what_they_write() -> None:
    """A recurrent layer writes to its states in place."""
    model, ids = hmt_model("mamba2", summary_source="previous"), token_ids(1, 40)
    (state,) = step(model, [model.read(ids[:, :32])], [ids[0, 32:35]])[1]
    tokens = [torch.tensor([7]), torch.tensor([9])]
    expected = [step(model, [state.without_cache()], [token])[0][0] for token in tokens]
    found, _ = step(model, [state, state], tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*expected, atol=1e-2)
