"""Architectures that differ in what HMT depends on; `make architectures` tries all that transformers has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import RefusedError, check, small_config, small_model, wrapped
from backbones import token_ids
from packaging.version import Version
from transformers import AutoModelForCausalLM, Gemma3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hmt import HMTForCausalLM

READ = {
    "bamba": "Mamba and attention, positions only where they are passed",
    "bart": "the decoder of an encoder-decoder model",
    "deepseek_v3": "values narrower than keys",
    "doge": "layers that compute with the mask",
    "dory": "layers that run several times, with caches of their own",
    "falcon_h1": "tokens scaled, embeddings not; scaled logits",
    "gpt_oss": "attention sinks",
    "granite": "scaled logits",
    "lfm2": "convolutions and attention",
    "llama4_text": "a prefix that does not lead to its layers",
    "minimax": "a cache of its own class",
    "mixtral": "experts",
    "qwen3_next": "linear and full attention, experts",
    "recurrent_gemma": "capped logits, states kept in the layers",
}
REFUSED = {
    "bert": "not causal",
    "modernbert-decoder": "computes its logits in a way that hmt does not know",
    "gemma4_text": "does not run on inputs_embeds alone",
}


def known(kind: str) -> str:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    if kind == "doge" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("Doge of older transformers sees later tokens, whoever runs it")
    return kind


@pytest.mark.parametrize("kind", READ)
def test_reads(kind: str) -> None:
    check(known(kind))


@pytest.mark.parametrize(("kind", "reason"), REFUSED.items())
def test_refuses_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        check(known(kind))


@torch.no_grad()
def test_chunks_of_attention() -> None:
    """A layer of Llama 4 sees no further back than its chunk begins."""
    config = small_config(known("llama4_text"))
    config.attention_chunk_size = 8
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), token_ids(1, 30)
    hmt = wrapped(model, mode="baseline", segment_length=32, num_sensory=0)
    torch.testing.assert_close(hmt(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(ids).logits[:, 9:], model(ids[:, 1:]).logits[:, 8:], atol=1e-3)


@torch.no_grad()
def test_attention_sinks_are_refused() -> None:
    model, ids, _ = small_model(known("gpt_oss"))
    with pytest.raises(ValueError, match=r"attention 'hmt': pass attn_implementation='eager' .*attention sinks"):
        wrapped(model, attn_implementation="hmt")
    model.set_attn_implementation("hmt")
    with pytest.raises(ValueError, match="does not support attention sinks"):
        model(ids)


def test_a_model_of_images_too_is_refused() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 64, "vocab_size": 128, "head_dim": 16}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="must be a text model, got Gemma3ForConditionalGeneration"):
        HMTForCausalLM.from_backbone(model)


@torch.no_grad()
def test_attention_that_does_not_fit_is_refused_and_never_the_default(tmp_path: Path) -> None:
    model, ids, _ = small_model(known("doge"))
    with pytest.raises(ValueError, match="does not run with attention 'hmt': pass attn_implementation='sdpa'"):
        HMTForCausalLM.from_backbone(model, attn_implementation="hmt")
    assert model.config._attn_implementation == "sdpa"  # as it was given
    hmt = wrapped(model)
    hmt.save_pretrained(tmp_path)
    loaded = HMTForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(ids).logits, hmt(ids).logits)
