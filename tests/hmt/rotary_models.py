"""Tiny models with rotary embedding inside the operator, and the same without."""

from __future__ import annotations

import torch
from backbones import backbone
from torch import nn
from transformers import PreTrainedModel

import hmt
from hmt import rotary


def fused(name: str = "llama", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = plain(name, dtype)
    hmt.fuse_rotary(model, everywhere=True)
    return model


def plain(name: str = "llama", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = backbone(name).to(dtype)
    model.set_attn_implementation("hmt")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped products have no float64
    return model


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    return [rotary.attention_of(layer) for layer in rotary.layers_of(model)]


def padded(rows: int, length: int, hidden: slice = slice(0, 7)) -> torch.Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, hidden] = 0
    return mask
