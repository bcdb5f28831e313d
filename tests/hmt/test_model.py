"""HMTForCausalLM on every backbone: the recurrence against a plain loop, state, masks and loss."""

from __future__ import annotations

import pytest
import torch
from backbones import CONFIGS, VOCAB, WITHOUT_ATTENTION, backbone, hmt_model, token_ids

from hmt import HMTForCausalLM
from hmt.recurrence import summarize
from hmt.tokens import Tokens

every_backbone = pytest.mark.parametrize("name", CONFIGS)


def plain_recurrence(model: HMTForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and memories by the definition, one full backbone pass at a time, no shared code with the model."""
    config, lm = model.config, model.backbone
    embed = lm.get_input_embeddings()
    rows = ids.shape[0]
    queue, logits, sensory = [], [], ids[:, :0]
    for start in range(0, ids.shape[1], config.segment_length):
        segment = ids[:, start : start + config.segment_length]
        memory = model.memory.expand(rows, 1, -1) if config.mode != "baseline" else None
        if queue and config.mode == "rmt":
            memory = queue[-1]
        elif queue and config.mode == "hmt":
            prompt = model.summary_prompt.expand(rows, 1, -1)
            half = embed(segment[:, : config.summary_length])
            q = lm(inputs_embeds=torch.cat([prompt, half, prompt], 1), output_hidden_states=True).hidden_states[-1][
                :, -1:
            ]
            q = q.to(model.dtype)  # Mamba keeps what it adds up in float32
            past = torch.cat(queue[-config.queue_size :], dim=1).to(model.dtype)
            keys = past @ model.recall.wk.weight.T
            scores = (q @ model.recall.wq.weight.T) @ keys.transpose(1, 2) * model.recall.softmax_scale
            memory = scores.softmax(-1) @ past
        slots = [] if memory is None else [memory]
        embeds = torch.cat([*slots, embed(sensory), embed(segment), *slots], dim=1)
        out = lm(inputs_embeds=embeds, output_hidden_states=True)
        front = len(slots) + sensory.shape[1]
        logits.append(out.logits[:, front : front + segment.shape[1]])
        if slots:
            queue.append(out.hidden_states[-1][:, -1:])
        sensory = segment[:, segment.shape[1] - config.num_sensory :] if config.num_sensory else segment[:, :0]
    return torch.cat(logits, dim=1), torch.cat(queue, dim=1) if queue else None


@every_backbone
@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
@torch.no_grad()
def test_forward_is_the_definition(name: str, mode: str) -> None:
    model = hmt_model(name, mode=mode)
    ids = token_ids(2, 16 * 6)
    out = model(ids, output_trace=True)
    logits, memories = plain_recurrence(model, ids)
    torch.testing.assert_close(out.logits, logits, atol=2e-4, rtol=1e-4)
    if mode != "baseline":
        torch.testing.assert_close(out.trace["memory"], memories, atol=2e-4, rtol=1e-4)
        kept = min(6, out.state.queue.shape[1])
        torch.testing.assert_close(out.state.memories(), memories[:, -kept:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [16 * 6, 16 * 5 + 7], ids=["closed", "open"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_step_between_segments_is_the_recurrence_with_gradients(
    tokens: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients every recall but a call's first is fused with the write before it; the results stay."""
    model, ids = hmt_model("llama", queue_size=3), token_ids(2, tokens)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    expected = model(ids, attention_mask=mask, output_trace=True)
    fused = []
    step = type(model.recall).step
    monkeypatch.setattr(type(model.recall), "step", lambda *args: fused.append(args) or step(*args))
    with torch.no_grad():
        first = model.read(ids[:, :32], attention_mask=mask[:, :32])
        kept = first.queue.clone()
        out = model(ids[:, 32:], attention_mask=mask[:, 32:], state=first, output_trace=True)
    assert len(fused) == 1 + 3
    assert torch.equal(first.queue, kept)
    torch.testing.assert_close(out.logits, expected.logits[:, 32:], atol=1e-5, rtol=1e-5)
    for name in ("recalled", "age"):
        torch.testing.assert_close(out.trace[name], expected.trace[name][:, 2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.state.memories(), expected.state.memories(), atol=1e-5, rtol=1e-5)


@every_backbone
@torch.no_grad()
def test_a_future_token_changes_no_earlier_logit(name: str) -> None:
    """Exactly zero in the causal mode; in the default mode nothing before the segment that holds the token."""
    ids = token_ids(2, 16 * 4 + 9)
    changed = ids.clone()
    position = 16 * 2 + 5
    changed[:, position] = (changed[:, position] + 1) % VOCAB
    for source, first in (("previous", position), ("current", 16 * 2)):
        model = hmt_model(name, summary_source=source)
        a, b = model(ids).logits, model(changed).logits
        assert torch.equal(a[:, :first], b[:, :first])
        assert not torch.equal(a[:, position:], b[:, position:])


@every_backbone
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@torch.no_grad()
def test_token_by_token_equals_teacher_forcing(name: str, padded: bool) -> None:
    """In the causal mode, across segment borders, with and without the cache."""
    model = hmt_model(name, summary_source="previous")
    ids = token_ids(2, 16 * 3 + 7)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :21] = 0
    whole = model(ids, attention_mask=mask)
    for use_cache in (True, False):
        state, rows = None, []
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], attention_mask=mask[:, t : t + 1], state=state, use_cache=use_cache)
            state = out.state
            rows.append(out.logits)
        visible = mask.bool()
        torch.testing.assert_close(torch.cat(rows, dim=1)[visible], whole.logits[visible], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state.memories(), whole.state.memories(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [(1, 2), (15, 16, 17), (16, 32, 48), (40,), (63, 64)], ids=str)
@pytest.mark.parametrize("source", ["current", "previous"])
@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
@torch.no_grad()
def test_reading_in_parts_equals_reading_at_once(cuts: tuple[int, ...], source: str, mode: str) -> None:
    model = hmt_model(mode=mode, summary_source=source)
    ids = token_ids(2, 70)
    whole = model(ids)
    read = model.read(ids)
    state, logits = None, []
    parts = list(zip((0, *cuts), (*cuts, 70), strict=True))
    for start, stop in parts:
        out = model(ids[:, start:stop], state=state)
        state, logits = out.state, [*logits, out.logits]
    in_parts = None
    for start, stop in parts:
        in_parts = model.read(ids[:, start:stop], state=in_parts)
    for other in (state, read, in_parts):
        assert (other.num_closed, other.num_open) == (whole.state.num_closed, whole.state.num_open)
        assert torch.equal(other.recent.ids, whole.state.recent.ids)
        assert torch.equal(other.open.ids, whole.state.open.ids)
        if mode != "baseline":
            torch.testing.assert_close(other.queue, whole.state.queue, atol=1e-5, rtol=1e-5)
    if source == "previous" or mode != "hmt":
        torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=1e-5, rtol=1e-5)
    else:  # the summary of a segment read in parts grows with it; whole segments and the last part are the same
        last = parts[-1][0]
        torch.testing.assert_close(logits[-1], whole.logits[:, last:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_state_can_be_continued_twice() -> None:
    model = hmt_model()
    state = model.read(token_ids(1, 50))
    queue = state.queue.clone()
    once = model(token_ids(1, 40, seed=1), state=state, use_cache=True)
    model(token_ids(1, 40, seed=2), state=state, use_cache=True)
    again = model(token_ids(1, 40, seed=1), state=state, use_cache=True)
    assert torch.equal(state.queue, queue)
    assert torch.equal(once.logits, again.logits)
    # the second step extends the cache that the state still refers to: the third must notice and rebuild it
    steps = [model(token_ids(1, 1, seed=n), state=again.state, use_cache=True).logits for n in (3, 4, 3)]
    torch.testing.assert_close(steps[0], steps[2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(steps[0], steps[1])


@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
def test_loss_and_gradients_in_chunks(mode: str) -> None:
    """The chunked loss is transformers' loss on the logits, gradients included; labels of -100 do not count."""
    model = hmt_model(mode=mode, loss_chunk_size=7)
    ids = token_ids(2, 16 * 5 + 3)
    labels = ids.clone()
    labels[:, ::5] = -100
    out = model(ids, labels=labels)
    assert out.logits is None
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(ids).logits
    expected = model.backbone.loss_function(logits, labels, vocab_size=VOCAB)
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    own = {"hmt": {"memory", "summary_prompt", "recall.wq.weight", "recall.wk.weight"}, "rmt": {"memory"}}
    assert own.get(mode, set()) <= gradients.keys()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_shifted_labels_join_two_calls() -> None:
    """Scoring in parts with shift_labels counts the token at the border, like scoring at once."""
    model = hmt_model(summary_source="previous")
    ids = token_ids(2, 60)
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    with torch.no_grad():
        whole = model(ids, labels=ids).loss * 2 * 59
        first = model(ids[:, :30], shift_labels=following[:, :30])
        second = model(ids[:, 30:], shift_labels=following[:, 30:], state=first.state)
    torch.testing.assert_close(first.loss * 2 * 30 + second.loss * 2 * 29, whole)


def test_num_items_in_batch_divides_the_loss() -> None:
    model = hmt_model()
    ids = token_ids(2, 40)
    mean, summed = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=1).loss
    torch.testing.assert_close(mean * 2 * 39, summed)


@pytest.mark.parametrize("keep", [1, 5, 40], ids=str)
@torch.no_grad()
def test_only_the_logits_asked_for(keep: int) -> None:
    model = hmt_model()
    ids = token_ids(2, 55)
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, -keep:])
    assert model(ids, labels=ids, logits_to_keep=0).logits.shape == (2, 55, VOCAB)


@pytest.mark.parametrize("batch", [1, 2, 3, 64], ids=str)
@torch.no_grad()
def test_summary_batches_do_not_matter(batch: int) -> None:
    model = hmt_model()
    texts = [Tokens(token_ids(2, n, seed=n)) for n in (8, 8, 8, 5, 8)]
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    texts[1] = Tokens(texts[1].ids, mask)
    one_by_one = [summarize(model.backbone, model.summary_prompt, [t], 1)[0] for t in texts]
    together = summarize(model.backbone, model.summary_prompt, texts, batch)
    for a, b in zip(one_by_one, together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "mistral-window", "gpt2", *WITHOUT_ATTENTION])
@torch.no_grad()
def test_padding_tokens_are_never_seen(name: str) -> None:
    """What stands in a padded place, in the middle of the augmented sequence, changes no visible logit."""
    model = hmt_model(name, num_sensory=0)
    ids = token_ids(3, 16 * 3)
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    mask[2, 40:] = 0
    other = torch.where(mask.bool(), ids, (ids + 1) % VOCAB)
    a, b = model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits
    assert torch.equal(a[mask.bool()], b[mask.bool()])
    alone = model(ids[:1]).logits
    torch.testing.assert_close(a[:1], alone, atol=1e-5, rtol=1e-5)


@every_backbone
def test_wrapping_leaves_the_backbone_as_it_was(name: str) -> None:
    lm = backbone(name)
    ids = token_ids(1, 20)
    with torch.no_grad():
        before = lm(ids).logits
    weights = {n: p.clone() for n, p in lm.named_parameters()}
    model = HMTForCausalLM.from_backbone(lm, segment_length=16, num_sensory=3)
    for n, p in lm.named_parameters():
        assert torch.equal(p, weights[n])
    with torch.no_grad():
        torch.testing.assert_close(lm(ids).logits, before, atol=1e-5, rtol=1e-5)
    assert model.config.text_config is lm.config


def test_hooks_of_the_embedding_see_tokens() -> None:
    """Those of NEFTune divide by their number."""
    model = hmt_model()
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    with torch.no_grad():
        model(token_ids(1, 50))
    assert seen and all(seen)


@torch.no_grad()
def test_the_recurrence_compiles_without_a_graph_break(fresh_compiler: None) -> None:
    model, ids = hmt_model(cuda_graphs=False), token_ids(1, 20)
    expected = model(ids).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, expected)
