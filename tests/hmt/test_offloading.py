"""Backbones that are larger than memory: parts that accelerate keeps on disk, models without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from backbones import backbone, hmt_model, token_ids
from transformers import AutoModelForCausalLM

from hmt import HMTForCausalLM

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
SETTINGS = {"segment_length": 16, "num_sensory": 3, "queue_size": 3}


@torch.no_grad()
def assert_same(model: HMTForCausalLM, expected: HMTForCausalLM) -> None:
    ids = token_ids(2, 50)
    found, wanted = (m(ids, labels=ids, logits_to_keep=0) for m in (model, expected))
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, wanted.loss)
    found, wanted = (m.generate(ids[:, :20], max_new_tokens=20, do_sample=False) for m in (model, expected))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1", "lm_head"])
@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
def test_a_backbone_with_a_part_on_disk(part: str, mode: str, tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path / "backbone")
    where = {name: "disk" if name == part else "cpu" for name in PARTS}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "backbone", device_map=where, offload_folder=tmp_path / "disk"
    )
    model = HMTForCausalLM.from_backbone(loaded, mode=mode, **SETTINGS)
    expected = HMTForCausalLM.from_backbone(backbone(), mode=mode, **SETTINGS)
    own = [(name, weight) for name, weight in model.named_parameters() if not name.startswith("backbone.")]
    assert {weight.device.type for weight in model.backbone.parameters()} == {"cpu", "meta"}
    of_tokens = backbone().get_input_embeddings().weight.std().item()
    assert mode == "baseline" or model.memory.std().item() == pytest.approx(of_tokens, rel=0.3)
    expected.load_state_dict(dict(own), strict=False)
    assert_same(model, expected)


def test_a_saved_hmt_that_fits_in_part(tmp_path: Path) -> None:
    expected = hmt_model()
    expected.save_pretrained(tmp_path / "hmt")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hmt", device_map="auto", max_memory={"cpu": 200_000}, offload_folder=tmp_path / "disk"
    )
    assert {weight.device.type for weight in model.parameters()} == {"cpu", "meta"}
    assert_same(model, expected)


@pytest.mark.parametrize("context", [init_empty_weights, lambda: torch.device("meta")], ids=["accelerate", "meta"])
def test_a_model_without_weights(context) -> None:
    """As it is made to plan where which part of it will lie."""
    with context():
        model = AutoModelForCausalLM.from_config(hmt_model().config)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert model.state_dict().keys() == hmt_model().state_dict().keys()
