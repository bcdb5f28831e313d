"""The static segment step reads as model.read does; what a CUDA graph needs of it holds on CPU too."""

from __future__ import annotations

import pytest
import torch
from backbones import hmt_model, token_ids
from test_state import assert_equal

from hmt import static_step
from hmt.static_step import static_reader


@pytest.mark.parametrize("name", ["llama", "opt-projected", "mistral-window"])
@pytest.mark.parametrize("source", ["current", "previous"])
@pytest.mark.parametrize("sensory", [3, 0], ids=["sensory", "no-sensory"])
def test_static_steps_read_as_the_model_does(name: str, source: str, sensory: int) -> None:
    """Texts of every kind of length, one after the other through the same buffers; states given stay as they were."""
    model = hmt_model(name, summary_source=source, num_sensory=sensory)
    read = static_reader(model, batch_size=2)
    for lengths in ((16 * 6,), (7, 16 * 3), (20, 5, 16 * 4 + 3), (16, 16, 15, 1)):
        state = expected = None
        for number, length in enumerate(lengths):
            ids = token_ids(2, length, seed=number)
            before = None if state is None else state.queue.clone()
            old, state = state, read(ids, state)
            assert old is None or torch.equal(old.queue, before)
            expected = model.read(ids, expected)
            assert (state.num_closed, state.num_open) == (expected.num_closed, expected.num_open)
            torch.testing.assert_close(state.queue, expected.queue, atol=1e-5, rtol=1e-5)
            for part in ("recent", "open"):
                assert torch.equal(getattr(state, part).ids, getattr(expected, part).ids)


def test_every_step_uses_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays addresses: no buffer is replaced, and one step is all that runs per segment."""
    model, addresses = hmt_model(), []

    def watched(model, buffers) -> None:
        addresses.append(tuple(tensor.data_ptr() for tensor in vars(buffers).values()))
        step(model, buffers)

    step = static_step.segment_step
    monkeypatch.setattr(static_step, "segment_step", watched)
    read = static_reader(model)
    state = read(token_ids(1, 16 * 5), None)
    read(token_ids(1, 16 * 3), state)
    assert len(addresses) == 4 + 3 and len(set(addresses)) == 1


def test_the_hidden_states_are_there_for_a_head() -> None:
    model = hmt_model()
    buffers = static_step.new_buffers(model, 2)
    ids = token_ids(2, 16 * 3)
    with torch.no_grad():
        state = model.read(ids[:, :32])
        query = static_step.recall_queries(model, [static_step.Tokens(ids[:, 32:])], state)[0]
        buffers.queue.copy_(state.queue)
        buffers.memory.copy_(state.queue[:, 1])
        buffers.ids.copy_(torch.cat([ids[:, 29:32], ids[:, 32:]], dim=1))
        buffers.query.copy_(query)
        buffers.slot.fill_(1)
        buffers.num_valid.fill_(2)
        static_step.segment_step(model, buffers)
        logits = model.backbone.lm_head(buffers.hidden)
        expected = model(ids[:, 32:], state=state)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(buffers.memory, expected.state.queue[:, 2], atol=1e-5, rtol=1e-5)


def test_what_it_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match="mode 'hmt'"):
        static_reader(hmt_model(mode="rmt"))
    model = hmt_model()
    read = static_reader(model)
    with pytest.raises(ValueError, match="1 rows"):
        read(token_ids(2, 20), None)
    with pytest.raises(ValueError, match="own size"):
        read(token_ids(1, 20), hmt_model(queue_size=9).new_state())
    state = read(token_ids(1, 20), None)
    assert_equal(state, model.read(token_ids(1, 20)))
