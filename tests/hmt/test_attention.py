"""attn_implementation="hmt" inside transformers: every backbone, caches, padding, windows, training, fallbacks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from backbones import CONFIGS, ROTARY_CONFIGS, WITHOUT_ATTENTION, backbone, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hmt.attention import hmt_mask, pad_span_of, read_mask

USABLE = [name for name in CONFIGS if name not in ("gemma2", *WITHOUT_ATTENTION)]
MORE = list(ROTARY_CONFIGS)


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights with attention "hmt" and "eager"."""
    ours, eager = backbone(name), backbone(name)
    ours.set_attn_implementation("hmt")
    eager.set_attn_implementation("eager")
    return ours, eager


def padding(kind: str, rows: int, length: int) -> torch.Tensor | None:
    mask = torch.ones(rows, length, dtype=torch.long)
    if kind == "none":
        return None
    if kind in ("left", "both"):
        mask[0, :7] = 0
    if kind in ("right", "both"):
        mask[0, -5:] = 0
    if kind == "middle":
        mask[0, 5:19] = 0
        mask[1, 11:12] = 0
    return mask


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in USABLE for kind in ("none", "left", "right", "middle", "both")]
    + [(name, kind) for name in MORE for kind in ("none", "middle")],
)
@torch.no_grad()
def test_same_logits_as_eager(name: str, kind: str) -> None:
    ours, eager = pair(name)
    ids, mask = token_ids(3, 41), padding(kind, 3, 41)
    a, b = ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits
    visible = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(a[visible], b[visible], atol=1e-4, rtol=1e-4)
    assert not a.isnan().any()


@pytest.mark.parametrize("name", USABLE)
def test_same_gradients_as_eager(name: str) -> None:
    ours, eager = pair(name)
    ids, mask = token_ids(2, 33), padding("left", 2, 33)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 7] = -100  # predicted by a padded position, which attends to nothing here and to everything in eager
    for model in (ours, eager):
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    for (key, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", USABLE)
def test_autocast_trains_as_with_sdpa(name: str) -> None:
    """The rotary tables are float32 there: q and k come in another dtype than v."""
    ours, theirs = backbone(name), backbone(name)
    ours.set_attn_implementation("hmt")
    theirs.set_attn_implementation("sdpa")
    ids = token_ids(2, 19)
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.grad is not None:
            scale = b.grad.abs().max().item() + 1e-3
            assert (a.grad - b.grad).abs().max() <= 0.03 * scale, f"{key} differs"


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate_with_caches(name: str, cache: str) -> None:
    ours, eager = pair(name)
    ids, mask = token_ids(2, 30), padding("left", 2, 30)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    for given in (None, mask):
        a = ours.generate(ids, attention_mask=given, **settings)
        b = eager.generate(ids, attention_mask=given, **settings)
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_dropout_is_applied_in_training(name: str) -> None:
    """The operator has no dropout: training with it takes SDPA, with the same mask."""
    model = backbone(name)
    model.set_attn_implementation("hmt")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.5
    ids, mask = token_ids(2, 21), padding("left", 2, 21)
    quiet = model(ids, attention_mask=mask).logits
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module is not getattr(module, "attn_dropout", None):
            module.p = 0.0 if module.p != 0.5 else 0.5
    torch.manual_seed(1)
    first = model(ids, attention_mask=mask).logits
    second = model(ids, attention_mask=mask).logits
    assert not torch.equal(first, second) and not torch.equal(first, quiet)
    changed = ids.clone()
    changed[:, -1] += 1
    torch.manual_seed(1)
    torch.testing.assert_close(model(changed, attention_mask=mask).logits[:, :-1], first[:, :-1])


def test_soft_cap_is_refused() -> None:
    model = backbone("gemma2")
    with pytest.raises(ValueError, match="attention"):
        model.set_attn_implementation("hmt")
        model(token_ids(1, 8))


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [
        ([], [[0, 0]]),
        ([0, 1], [[0, 2]]),
        ([3, 4, 5], [[3, 6]]),
        ([9], [[9, 10]]),
        (list(range(10)), [[0, 10]]),
        ([0, 9], None),
        ([2, 4], None),
    ],
    ids=str,
)
def test_pad_span(hidden: list[int], expected: list[list[int]] | None) -> None:
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[:, hidden] = False
    span = pad_span_of(mask)
    assert (span is None) == (expected is None)
    if expected is not None:
        assert span.dtype == torch.int32 and span.tolist() == expected


def test_mask_is_never_larger_than_needed() -> None:
    """None for plain causal attention, a span for one run of padding, a boolean mask only for the rest."""
    arguments = {"batch_size": 2, "q_length": 8, "kv_length": 8, "mask_function": causal_mask_function, "device": "cpu"}
    everything = torch.ones(2, 8, dtype=torch.bool)
    one_run, two_runs = everything.clone(), everything.clone()
    one_run[0, :3] = False
    two_runs[0, [0, 4]] = False
    assert hmt_mask(**arguments) is None
    assert hmt_mask(**arguments, attention_mask=everything) is None
    assert hmt_mask(**arguments, attention_mask=one_run).tolist() == [[[[0, 3]]], [[[0, 0]]]]
    dense = hmt_mask(**arguments, attention_mask=two_runs)
    expected = torch.ones(8, 8, dtype=torch.bool).tril()[None, None] & two_runs[:, None, None]
    assert torch.equal(dense, expected)
    assert hmt_mask(**arguments, allow_is_causal_skip=False).shape == (2, 1, 8, 8)


def test_mask_of_a_window_says_so() -> None:
    """Not every layer passes on that it has a window: Qwen2-MoE leaves it to the mask."""
    config = CONFIGS["mistral-window"]()
    window = {"local_size": 16, "mask_function": sliding_window_causal_mask_function(16), "config": config}
    arguments = {"batch_size": 2, "q_length": 20, "kv_length": 20, "device": "cpu", **window}
    padded = torch.ones(2, 20, dtype=torch.bool)
    padded[0, :3] = False
    layer = SimpleNamespace(config=config)
    for mask, span in ((None, None), (padded | True, None), (padded, [[0, 3], [0, 0]])):
        described = hmt_mask(**arguments, attention_mask=mask)
        pad_span, window_size = read_mask(layer, described, None)
        assert described.dtype == torch.int32 and window_size == 16
        assert (pad_span if span is None else pad_span.tolist()) == span
    assert read_mask(layer, described[:, :1], None)[1] is None
    assert read_mask(layer, described, 5)[1] == 5


@torch.no_grad()
def test_packed_sequences_stay_apart() -> None:
    """Position ids that restart mean packed sequences, which only a boolean mask can describe."""
    ours, eager = pair("llama")
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    ids = token_ids(1, 21)
    a, b = (model(ids, position_ids=positions, use_cache=False).logits for model in (ours, eager))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    alone = ours(ids[:, 9:]).logits
    torch.testing.assert_close(a[:, 9:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_compiles_without_a_graph_break(padded: bool, fresh_compiler: None) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hmt").eval()
    ids, mask = token_ids(2, 12) % 64, padding("left" if padded else "none", 2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        a, b = (run(ids, attention_mask=mask).logits for run in (compiled, model))
    visible = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(a[visible], b[visible], atol=1e-5, rtol=1e-5)
