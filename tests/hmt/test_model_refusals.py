"""Backbones, arguments and settings that an HMT refuses, and what they are left as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import backbone, hmt_model, token_ids
from transformers import AutoModelForCausalLM, BartConfig, BertConfig, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.bart import BartForConditionalGeneration

from hmt import HMTForCausalLM


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "transformers causal language model"),
        (lambda: LlamaModel(LlamaConfig(**_SMALL)), ValueError, "LM head"),
        (lambda: BartForConditionalGeneration(BartConfig(**_BART)), ValueError, "decoder-only"),
        (lambda: AutoModelForCausalLM.from_config(BertConfig(**_SMALL)), ValueError, "not causal"),
    ],
    ids=["no-transformers-model", "no-head", "encoder-decoder", "not-causal"],
)
def test_refused_backbones(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HMTForCausalLM.from_backbone(make(), segment_length=16, num_sensory=3)


_SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


_BART = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids"),
        ({"input_ids": torch.zeros(2, 3)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, ValueError, "input_ids"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "at least one token"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, ValueError, "at least one token"),
        ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask"),
        ({"labels": torch.ones(2, 9, dtype=torch.long)}, ValueError, "labels"),
        ({"shift_labels": torch.ones(1, 8, dtype=torch.long)}, ValueError, "shift_labels"),
        ({"logits_to_keep": -1}, ValueError, "logits_to_keep"),
        ({"logits_to_keep": torch.tensor([1])}, ValueError, "logits_to_keep"),
        ({"state": "yesterday"}, TypeError, "state"),
        ({"state": 2}, ValueError, "state has 2 rows"),
        ({"inputs_embeds": torch.ones(1, 9, 64)}, TypeError, "inputs_embeds"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    model = hmt_model()
    if arguments.get("state") == 2:
        arguments = {"state": model.new_state(2)}
    with pytest.raises(error, match=message):
        model(**{"input_ids": token_ids(1, 9), **arguments})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lstm"}, "mode"),
        ({"summary_source": "next"}, "summary_source"),
        ({"segment_length": 0}, "segment_length"),
        ({"segment_length": 8, "num_sensory": 9}, "num_sensory"),
        ({"num_sensory": -1}, "num_sensory"),
        ({"queue_size": 0}, "queue_size"),
        ({"queue_size": True}, "queue_size"),
        ({"queue_size": 65_537}, "queue_size must be at most 65536"),
        ({"summary_fraction": 0.0}, "summary_fraction"),
        ({"summary_fraction": 1.5}, "summary_fraction"),
        ({"recall_dim": 0}, "recall_dim"),
        ({"summary_batch_size": 0}, "summary_batch_size"),
        ({"loss_chunk_size": 0}, "loss_chunk_size"),
        ({"bptt_depth": 0}, "bptt_depth"),
        ({"rematerialize": "yes"}, "rematerialize"),
        ({"offload_states": 1}, "offload_states"),
        ({"cuda_graphs": 1}, "cuda_graphs"),
        ({"compile_layers": "max"}, "compile_layers"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hmt_model(**settings)


@torch.no_grad()
def test_a_width_that_recall_does_not_take_is_said_at_once() -> None:
    lm = LlamaForCausalLM(LlamaConfig(**_SMALL | {"hidden_size": 36, "num_attention_heads": 3}))
    with pytest.raises(ValueError, match="width that is a multiple of 8, at most 8192, for recall, got 36"):
        HMTForCausalLM.from_backbone(lm, segment_length=16, num_sensory=3)
    rmt = HMTForCausalLM.from_backbone(lm, segment_length=16, num_sensory=3, mode="rmt")
    assert rmt(torch.ones(1, 40, dtype=torch.long)).logits.isfinite().all()


def test_a_backbone_that_is_refused_is_as_it_was() -> None:
    lm = backbone("opt")
    with pytest.raises(ValueError, match="rotary embedding cannot be fused"):
        HMTForCausalLM.from_backbone(lm, segment_length=16, num_sensory=3, fused_rotary=True)
    assert lm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "settings",
    [
        {"summary_source": "prevoius"},
        {"num_sensory": 17},
        {"segment_length": 2},
        {"mode": "RMT"},
        {"bptt_depth": 0},
        {"queue_size": 0},
        {"compile_layers": True, "fused_rotary": True},
    ],
    ids=str,
)
def test_settings_that_come_after_a_config_was_made_are_checked_too(settings: dict, tmp_path: Path) -> None:
    """Those of a load, and those that are set on a model, which nobody could load again."""
    model = hmt_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=" must "):
        HMTForCausalLM.from_pretrained(tmp_path, **settings)
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=" must "):
        model.save_pretrained(tmp_path / "again")


def test_a_backbone_in_place_of_an_hmt_is_named(tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no HMT but a model of type 'llama': HMTForCausalLM\.from_backbone"):
        HMTForCausalLM.from_pretrained(tmp_path)
