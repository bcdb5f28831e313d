"""The model and the text that the benchmarks of the model layer run: SmolLM-135M's shape with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hmt import HMTForCausalLM

NAME = "SmolLM-135M shape, L = 512, k = 32, N = 300, 8 segments, B = 1, float32"
SEGMENTS = 8
SEGMENT_LENGTH = 512
VOCAB_SIZE = 49152
SETTINGS = {"segment_length": SEGMENT_LENGTH, "num_sensory": 32, "queue_size": 300, "recall_dim": 576}


def build(**settings: Any) -> HMTForCausalLM:
    """30 layers of width 576 with 9 heads over 3, vocabulary 49,152, tied embeddings; always the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    backbone = AutoModelForCausalLM.from_config(config).eval()
    return HMTForCausalLM.from_backbone(backbone, **{**SETTINGS, **settings})


def text(segments: int = SEGMENTS, segment_length: int = SEGMENT_LENGTH) -> Tensor:
    """Token ids [1, segments * L]."""
    return torch.randint(VOCAB_SIZE, (1, segments * segment_length), generator=torch.Generator().manual_seed(1))
