"""generate(): segments close as a forward pass closes them, without limit, through transformers' own arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import golden
import pytest
import torch
from backbones import GROUPED, VOCAB, backbone, hmt_model, token_ids
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GenerationConfig, LlamaConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from hmt import HMTForCausalLM
from hmt.serving import step

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def naive_greedy(model: HMTForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy continuation without cache or shared code: p_n is fixed when a segment opens, taken anew to close it."""
    config, lm = model.config, model.backbone
    embed = lm.get_input_embeddings()
    rows, length = ids.shape[0], config.segment_length

    def run(embeds: torch.Tensor) -> torch.Tensor:
        return lm(inputs_embeds=embeds, output_hidden_states=True)

    def recall(segment: torch.Tensor, queue: list) -> torch.Tensor:
        if not queue:
            return model.memory.expand(rows, 1, -1)
        if config.mode == "rmt":
            return queue[-1]
        prompt = model.summary_prompt.expand(rows, 1, -1)
        half = embed(segment[:, : config.summary_length])
        q = run(torch.cat([prompt, half, prompt], 1)).hidden_states[-1][:, -1:]
        past = torch.cat(queue[-config.queue_size :], dim=1)
        scores = (q @ model.recall.wq.weight.T) @ (past @ model.recall.wk.weight.T).transpose(1, 2)
        return (scores * model.recall.softmax_scale).softmax(-1) @ past

    queue, sensory, new = [], ids[:, :0], []
    open_ids, memory = ids[:, :0], None
    pending = ids
    while True:
        while pending.shape[1]:
            take = pending[:, : length - open_ids.shape[1]]
            opening = open_ids.shape[1] == 0
            open_ids, pending = torch.cat([open_ids, take], 1), pending[:, take.shape[1] :]
            if opening:
                memory = recall(open_ids, queue)
            if open_ids.shape[1] == length:
                memory = recall(open_ids, queue)
                out = run(torch.cat([memory, embed(sensory), embed(open_ids), memory], 1))
                logits = out.logits[:, -2]
                queue.append(out.hidden_states[-1][:, -1:])
                sensory, open_ids = open_ids[:, length - config.num_sensory :], open_ids[:, :0]
            else:
                logits = run(torch.cat([memory, embed(sensory), embed(open_ids)], 1)).logits[:, -1]
        if len(new) == count:
            return torch.cat(new, dim=1)
        new.append(logits.argmax(-1, keepdim=True))
        pending = new[-1]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "opt-projected", "gpt2", "gemma3", "mamba2"])
@pytest.mark.parametrize("mode", ["hmt", "rmt"])
@pytest.mark.parametrize("prompt", [5, 16, 39], ids=lambda n: f"prompt{n}")
@torch.no_grad()
def test_generation_crosses_segment_borders(name: str, mode: str, prompt: int) -> None:
    model = hmt_model(name, mode=mode)
    ids = token_ids(2, prompt)
    tokens = model.generate(ids, max_new_tokens=45, **GREEDY)
    assert torch.equal(tokens[:, :prompt], ids)
    assert torch.equal(tokens[:, prompt:], naive_greedy(model, ids, 45))


@pytest.mark.parametrize("source", ["current", "previous"])
@torch.no_grad()
def test_state_after_generation_is_that_of_reading(source: str) -> None:
    """The queue after generating equals that of one forward pass over prompt and generated text."""
    model = hmt_model(summary_source=source)
    ids = token_ids(2, 21)
    result = model.generate(ids, max_new_tokens=50, return_dict_in_generate=True, **GREEDY)
    state = result.past_key_values
    expected = model.read(result.sequences[:, :-1])  # the last token has been chosen, not yet read
    assert (state.num_closed, state.num_open) == (expected.num_closed, expected.num_open)
    torch.testing.assert_close(state.queue, expected.queue, atol=1e-5, rtol=1e-5)
    assert torch.equal(state.open.ids, expected.open.ids)


@torch.no_grad()
def test_generate_continues_a_state() -> None:
    model = hmt_model()
    ids = token_ids(2, 60)
    state = model.read(ids[:, :48])
    queue = state.queue.clone()
    continued = model.generate(ids[:, 48:], state=state, max_new_tokens=20, **GREEDY)
    assert torch.equal(continued, model.generate(ids, max_new_tokens=20, **GREEDY)[:, 48:])
    assert torch.equal(state.queue, queue)


@torch.no_grad()
def test_padded_batch() -> None:
    """A left-padded row gives what the padded forward pass gives, and padding's content does not matter."""
    model = hmt_model(num_sensory=0)
    ids = token_ids(2, 22)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    other = torch.where(mask.bool(), ids, ids + 1)
    a = model.generate(ids, attention_mask=mask, max_new_tokens=30, **GREEDY)
    b = model.generate(other, attention_mask=mask, max_new_tokens=30, **GREEDY)
    assert torch.equal(a[:, 22:], b[:, 22:])
    full = torch.cat([mask, torch.ones(2, 30, dtype=torch.long)], dim=1)
    first = model(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1].argmax(-1)
    assert torch.equal(a[:, 22], first)
    # at a segment's end decoding and teacher forcing see the same summary, so the next token must agree there
    closed = model(a[:, :32], attention_mask=full[:, :32], logits_to_keep=1).logits[:, -1].argmax(-1)
    assert torch.equal(a[:, 32], closed)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.ended = True


@torch.no_grad()
def test_streamer_sees_every_token() -> None:
    model, streamer = hmt_model(), Recorder()
    tokens = model.generate(token_ids(1, 20), max_new_tokens=33, streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat(streamer.pieces), tokens[0])
    assert len(streamer.pieces) == 1 + 33 and streamer.ended


def test_what_ends_a_text_and_how_to_sample_come_with_the_backbone(tmp_path: Path) -> None:
    """Chat models say in their generation config alone what ends an answer."""
    model = backbone()
    first = HMTForCausalLM.from_backbone(model, segment_length=16, num_sensory=3)
    ids = token_ids(1, 40)
    tokens = first.generate(ids, max_new_tokens=30, do_sample=False)[0, 40:].tolist()
    ends = tokens[12]
    model.generation_config.update(eos_token_id=[VOCAB - 1, ends], do_sample=True, temperature=0.6)
    wrapped = HMTForCausalLM.from_backbone(model, segment_length=16, num_sensory=3)
    wrapped.load_state_dict(first.state_dict())
    wrapped.save_pretrained(tmp_path)
    for ours in (wrapped, HMTForCausalLM.from_pretrained(tmp_path)):
        assert ours.generation_config.temperature == 0.6 and ours.generation_config.do_sample
        found = ours.generate(ids, max_new_tokens=30, do_sample=False)[0, 40:].tolist()
        assert found == tokens[: tokens.index(ends) + 1]
    assert first.generation_config.eos_token_id == 2  # neither shares it with the other


@torch.no_grad()
def test_a_backbone_that_cannot_generate_by_itself() -> None:
    class Bare(PreTrainedModel):
        config_class, _supports_sdpa = LlamaConfig, True

        def __init__(self, whole: PreTrainedModel) -> None:
            super().__init__(whole.config)
            self.model, self.lm_head = whole.model, whole.lm_head

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.lm_head

        def forward(self, input_ids=None, inputs_embeds=None, **options):
            hidden = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **options).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(hidden))

    model = HMTForCausalLM.from_backbone(Bare(backbone()).eval(), segment_length=16, num_sensory=3)
    whole = HMTForCausalLM.from_backbone(backbone(), segment_length=16, num_sensory=3)
    whole.load_state_dict(model.state_dict())
    ids = token_ids(1, 40)
    assert torch.equal(*(m.generate(ids, max_new_tokens=20, **GREEDY) for m in (model, whole)))


@torch.no_grad()
def test_sampling_is_seeded_and_follows_the_generation_config() -> None:
    model = hmt_model()
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=5, max_new_tokens=40, pad_token_id=0)
    config.eos_token_id = None
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(token_ids(2, 10), generation_config=config))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@torch.no_grad()
def test_generation_stops_at_eos() -> None:
    model = hmt_model()
    ids = token_ids(1, 10)
    free = model.generate(ids, max_new_tokens=40, **GREEDY)
    eos = int(free[0, 10 + 25])
    stopped = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=eos, pad_token_id=0)
    first = int((free[0, 10:] == eos).nonzero()[0])
    assert torch.equal(stopped, free[:, : 10 + first + 1])


@torch.no_grad()
def test_beam_search_scores_are_those_of_its_sequences() -> None:
    """The state follows the beams: the score of each sequence is the one that reading it token by token gives."""
    model = hmt_model(summary_source="previous")
    ids = token_ids(2, 14)
    out = model.generate(
        ids,
        max_new_tokens=12,
        num_beams=3,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    logits = model(out.sequences).logits.log_softmax(-1)
    chosen = logits[:, 13:-1].gather(2, out.sequences[:, 14:, None])[..., 0].sum(1)
    torch.testing.assert_close(out.sequences_scores, chosen, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_several_sequences_from_one_state() -> None:
    model = hmt_model()
    state = model.read(token_ids(1, 40))
    tokens = model.generate(
        token_ids(1, 4, seed=1), state=state, num_return_sequences=3, do_sample=True, top_k=3, max_new_tokens=20,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert tokens.shape == (3, 24)
    assert len({tuple(row) for row in tokens.tolist()}) > 1


@torch.no_grad()
def test_generation_without_cache_in_the_causal_mode_is_the_same() -> None:
    model = hmt_model(summary_source="previous")
    ids = token_ids(2, 20)
    assert torch.equal(
        model.generate(ids, max_new_tokens=30, **GREEDY),
        model.generate(ids, max_new_tokens=30, use_cache=False, **GREEDY),
    )


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ({"output_hidden_states": True}, "argument"),
        ({"output_attentions": True}, "config"),
        ({"guidance_scale": 1.5}, "argument"),
        ({"guidance_scale": 1.5}, "config"),
        ({"assistant_model": "x"}, "argument"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_named(option: dict, given: str) -> None:
    model = hmt_model()
    settings = option if given == "argument" else {"generation_config": GenerationConfig(**option)}
    with pytest.raises(ValueError, match=f"cannot do {next(iter(option))}"):
        model.generate(token_ids(1, 20), max_new_tokens=2, **settings)
    assert model.generate(token_ids(1, 20), max_new_tokens=2, guidance_scale=1.0).shape == (1, 22)


def test_embeddings_are_refused() -> None:
    model = hmt_model()
    with pytest.raises((ValueError, TypeError), match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 64), max_new_tokens=2)


@pytest.mark.parametrize("name", golden.names("i7") + golden.names("i8"))
@torch.no_grad()
def test_compat_generate_past_the_reference_limit(name: str) -> None:
    """More than L - k new tokens: HMT-pytorch crashes (HMT) or repeats itself (RMT); here the recurrence goes on."""
    case = golden.load(name)
    wrapper = golden.build_wrapper(case)
    ids = case.inputs["input_ids"]
    tokens = wrapper.generate(
        ids, case.inputs["attention_mask"], case.segment_size, max_new_tokens=case.max_new_tokens, **GREEDY
    )
    assert tokens.shape == (1, case.max_new_tokens)
    assert torch.equal(tokens, naive_greedy(wrapper.to_hmt(case.segment_size), ids, case.max_new_tokens))
    if case.tokens:  # until the open segment is full, the reference is right
        free = case.segment_size - ids.shape[1] % case.segment_size
        assert tokens[0, :free].tolist() == case.tokens[0][:free]


def test_gradients_after_a_prefix_that_was_read_without() -> None:
    """The buffers that the prefix has left are read again, not written to: a backward pass needs what is in them."""
    model, ids = hmt_model(), token_ids(2, 30)

    def decoded() -> torch.Tensor:
        with torch.no_grad():
            state = model(ids[:, :22], use_cache=True).state
        total = torch.zeros(())
        for i in range(22, 27):
            out = model(ids[:, i : i + 1], state=state, use_cache=True)
            state, total = out.state, total + out.logits.square().mean()
        return total

    decoded().backward()
    with torch.no_grad():
        state = model(ids[:, :22]).state
        at_once = model(ids[:, 22:27], state=state).logits.square().mean((0, 2)).sum()
    torch.testing.assert_close(decoded().detach(), at_once, atol=1e-5, rtol=1e-4)
    assert model.get_input_embeddings().weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2"])
def test_a_cache_of_inference_mode_outside_of_it(name: str) -> None:
    model, ids = hmt_model(name).eval(), token_ids(2, 23)
    with torch.inference_mode():
        state = model(ids[:, :22], use_cache=True).state
    with torch.no_grad():
        expected = model(ids[:, 22:], state=model(ids[:, :22], use_cache=True).state, use_cache=True).logits
        actual = model(ids[:, 22:], state=state, use_cache=True).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("source", ["current", "previous"])
def test_training_after_a_state_of_inference_mode(source: str, moved: bool) -> None:
    model, ids = hmt_model(summary_source=source), token_ids(2, 45)
    with torch.inference_mode():
        state = model.read(ids[:, :36])
    if moved:  # the memories alone are of inference mode then
        state = replace(model.read(ids[:, :36]), queue=state.queue)
    model(ids[:, 36:], labels=ids[:, 36:], state=state).loss.backward()
    found = model.recall.wq.weight.grad.clone()
    model.zero_grad()
    model(ids[:, 36:], labels=ids[:, 36:], state=model.read(ids[:, :36])).loss.backward()
    torch.testing.assert_close(found, model.recall.wq.weight.grad)
    assert found.any()


@pytest.mark.parametrize("layers", ["all", "the second"])
@torch.no_grad()
def test_a_cache_that_is_full_before_its_segment(layers: str) -> None:
    """It was made for shorter segments; a layer with a window keeps no buffer."""
    lm = backbone()
    if layers == "the second":
        types = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8, layer_types=types)
        lm = AutoModelForCausalLM.from_config(config).eval()
    model = HMTForCausalLM.from_backbone(lm, segment_length=16, num_sensory=3, summary_source="previous")
    ids = token_ids(1, 40)
    state = model(ids[:, :14], use_cache=True).state
    model.config.segment_length = 64
    plain = state.without_cache()
    for i in range(14, 30):
        found, expected = (model(ids[:, i : i + 1], state=s, use_cache=True) for s in (state, plain))
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
        state, plain = found.state, expected.state.without_cache()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "mamba"])
@torch.no_grad()
def test_a_cache_of_another_dtype(name: str) -> None:
    """The model has been rounded since it was filled."""
    model, ids = hmt_model(name), token_ids(1, 21)
    state = model(ids[:, :20], use_cache=True).state
    expected = model(ids[:, 20:], state=state.without_cache(), use_cache=True).logits
    found = model.bfloat16()(ids[:, 20:], state=state, use_cache=True).logits
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_autocast_that_ends_or_begins_within_a_segment(first: bool) -> None:
    """There rotated keys are float32, values are not."""
    model, ids = hmt_model(), token_ids(2, 25)
    with torch.autocast("cpu", torch.bfloat16, enabled=first):
        state = model(ids[:, :22], use_cache=True).state
    expected = model(ids[:, :25], logits_to_keep=3).logits
    states, found = state.split(), []
    with torch.autocast("cpu", torch.bfloat16, enabled=not first):
        for i in range(22, 25):
            out = model(ids[:, i : i + 1], state=state, use_cache=True)
            state = out.state
            found.append(out.logits.float())
        logits, states = step(model, states, [row[22:24] for row in ids])
        alone, _ = step(model, states, [row[24:] for row in ids])
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=0.1, rtol=0.1)
    torch.testing.assert_close(torch.stack(logits)[:, 0].float(), expected[:, 1], atol=0.1, rtol=0.1)
    torch.testing.assert_close(torch.stack(alone)[:, 0].float(), expected[:, 2], atol=0.1, rtol=0.1)


def test_continuous_batching_says_what_to_use_instead() -> None:
    model = hmt_model()
    config = GenerationConfig(max_new_tokens=5, eos_token_id=-1, pad_token_id=0)
    with pytest.raises(NotImplementedError, match=r"hmt\.serving\.step"):
        model.generate_batch([[5, 6, 7]], generation_config=config)
