"""Golden cases: inputs, weights, outputs and gradients recorded from HMT-pytorch on tiny backbones."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hmt.compat import MemoryCell, RecurrentWrapper
from hmt.config import embedding_width

DATA = Path(__file__).parent.parent / "data" / "golden"


def folder() -> Path:
    """All cases where HMT_GOLDEN names their folder, else the selection kept in the repository."""
    return Path(os.environ.get("HMT_GOLDEN", DATA))


def names(prefix: str = "") -> list[str]:
    return sorted(p.stem for p in folder().glob(f"{prefix}*.json"))


@dataclass
class Case:
    """One recorded run: `settings` from its .json, tensors by group from its .safetensors."""

    name: str
    settings: dict
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def __getattr__(self, key: str):
        try:
            return self.__dict__["settings"][key]
        except KeyError:
            raise AttributeError(key) from None


def load(name: str) -> Case:
    settings = json.loads((folder() / f"{name}.json").read_text())
    groups: dict[str, dict[str, Tensor]] = {"w": {}, "in": {}, "out": {}, "grad": {}}
    for key, value in load_file(folder() / f"{name}.safetensors").items():
        group, _, rest = key.partition(".")
        groups[group][rest] = value
    return Case(name, settings, groups["w"], groups["in"], groups["out"], groups["grad"])


def build_backbone(case: Case, attn_implementation: str = "hmt") -> torch.nn.Module:
    fields = dict(case.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    backbone.set_attn_implementation(attn_implementation)
    return backbone


def build_wrapper(case: Case, attn_implementation: str = "hmt") -> RecurrentWrapper:
    """HMT-pytorch's construction of the case's model, with its recorded weights."""
    backbone = build_backbone(case, attn_implementation)
    cell = MemoryCell(backbone, 0 if case.mode == "baseline" else 1, case.num_sensory)
    rmt_kwargs = {
        "segment_size": case.segment_size,
        "max_n_segments": 64,
        "mask_size": case.settings.get("mask_size"),
        "n_cell_out": 64,
        "segment_alignment": None,
    }
    if case.mode == "hmt":
        wrapper = RecurrentWrapper(
            cell,
            emb=backbone.get_input_embeddings(),
            word_emb_dim=embedding_width(backbone.config),
            hidden_dim=case.settings.get("recall_hidden_dim", case.weights["cross_attn.wq.weight"].shape[0]),
            ltm_context=case.ltm_context,
            **rmt_kwargs,
        )
    else:
        wrapper = RecurrentWrapper(cell, **rmt_kwargs)
    missing, unexpected = wrapper.load_state_dict(case.weights, strict=False)
    tied = {"memory_cell.model.lm_head.weight"} if backbone.config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    return wrapper.eval()
