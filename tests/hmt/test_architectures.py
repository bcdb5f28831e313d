"""Architectures that differ in what HMT depends on; `make architectures` tries all that transformers has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import RefusedError, check, small_model, wrapped
from packaging.version import Version
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
def test_attention_that_does_not_fit_is_refused_and_never_the_default(tmp_path: Path) -> None:
    model, ids, _ = small_model(known("doge"))
    with pytest.raises(ValueError, match="does not run with attention 'hmt': pass attn_implementation='sdpa'"):
        wrapped(model, attn_implementation="hmt")
    hmt = wrapped(model)
    hmt.save_pretrained(tmp_path)
    loaded = HMTForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(ids).logits, hmt(ids).logits)
