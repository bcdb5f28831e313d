"""The model and the text that the benchmarks of the model layer run: SmolLM-135M's shape with random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.sizes import DEVICE, size
from hmt import HMTForCausalLM

SEGMENTS = size(4, tiny=2)
SEGMENT_LENGTH = size(512, tiny=16)
NUM_SENSORY = size(32, tiny=4)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CONFIG = LlamaConfig(
    vocab_size=size(49152, tiny=128),
    hidden_size=size(576, tiny=64),
    intermediate_size=size(1536, tiny=96),
    num_hidden_layers=size(30, tiny=2),
    num_attention_heads=size(9, tiny=4),
    num_key_value_heads=size(3, tiny=2),
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
SETTINGS = {"segment_length": SEGMENT_LENGTH, "num_sensory": NUM_SENSORY, "queue_size": 300}
LLAMA_7B = LlamaConfig(
    vocab_size=size(32000, tiny=128),
    hidden_size=size(4096, tiny=64),
    intermediate_size=size(11008, tiny=96),
    num_hidden_layers=size(32, tiny=2),
    num_attention_heads=size(32, tiny=4),
    max_position_embeddings=4096,
    # the gain of a layer as in the shape above: with the default of 0.02, four segments turn the rounding of bfloat16
    # into other memories altogether, whoever computes them
    initializer_range=0.0075,
)


def build(dtype: torch.dtype = DTYPE, shape: LlamaConfig = CONFIG, **settings: Any) -> HMTForCausalLM:
    """30 layers of width 576 with 9 heads over 3, vocabulary 49,152, tied embeddings; always the same weights."""
    torch.manual_seed(0)
    given = {"dtype": dtype} if DEVICE == "cuda" else {}  # drawn in float32, seven billion of them would not fit thrice
    with torch.device(DEVICE):
        backbone = AutoModelForCausalLM.from_config(copy.deepcopy(shape), **given).eval()
    model = HMTForCausalLM.from_backbone(backbone, **{"recall_dim": shape.hidden_size, **SETTINGS, **settings})
    return model.to(device=DEVICE, dtype=dtype)


def weight_bytes(shape: LlamaConfig = CONFIG) -> int:
    """Of the backbone of `build`."""
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(shape)
    return sum(p.numel() for p in backbone.parameters()) * DTYPE.itemsize


def text(segments: int = SEGMENTS, segment_length: int = SEGMENT_LENGTH) -> Tensor:
    """Token ids [1, segments * L]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (1, segments * segment_length), generator=generator).to(DEVICE)
