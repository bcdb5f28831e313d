"""Tiny backbones of every tested architecture."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RwkvConfig,
)

from hmt import HMTForCausalLM

VOCAB = 128
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
RECURRENT = {name: value for name, value in SHAPE.items() if name != "num_attention_heads"}
MAMBA = {**RECURRENT, "state_size": 8, "initializer_range": 0.03}
GROUPED = {**SHAPE, "intermediate_size": 128, "num_key_value_heads": 2}
OPT = {**SHAPE, "ffn_dim": 128, "max_position_embeddings": 512}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "llama-tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "mistral-window": lambda: MistralConfig(**GROUPED, sliding_window=16),
    "opt": lambda: OPTConfig(**OPT, word_embed_proj_dim=64),
    "opt-projected": lambda: OPTConfig(**OPT, word_embed_proj_dim=48, do_layer_norm_before=False),
    "gpt2": lambda: GPT2Config(**GPT2, n_positions=512),
    "gpt-neox": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=128),
    "phi3": lambda: Phi3Config(**GROUPED),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=16, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=16),
    "mamba": lambda: MambaConfig(**MAMBA),
    "mamba2": lambda: Mamba2Config(**MAMBA, num_heads=8, head_dim=16, n_groups=2, chunk_size=8),
    "falcon-mamba": lambda: FalconMambaConfig(**MAMBA),
    "rwkv": lambda: RwkvConfig(**RECURRENT, attention_hidden_size=64),
}
WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon-mamba", "rwkv")

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# more makes of attention layers, and of rotary embedding
ROTARY_CONFIGS = {
    "llama-yarn": lambda: LlamaConfig(**GROUPED, rope_parameters=YARN),
    "granite": lambda: GraniteConfig(**GROUPED, attention_multiplier=0.2),
    "mixtral-window": lambda: MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=16),
    "qwen2-window": lambda: Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3-moe": lambda: Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=4, head_dim=16),
    "qwen2-moe-window": lambda: Qwen2MoeConfig(
        **GROUPED,
        **EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=32,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
    ),
    "phi3-partial": lambda: Phi3Config(
        **GROUPED,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "gpt-neox-serial": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=128, use_parallel_residual=False),
}


def backbone(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """The named tiny backbone in evaluation mode, with weights large enough that every part of the model matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((CONFIGS | ROTARY_CONFIGS)[name]()).eval()
    with torch.no_grad():
        if name == "rwkv":  # whose embeddings are almost nothing, and all else large enough
            model.get_input_embeddings().weight.mul_(1e4)
            return model
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not parameter_name.endswith("A_log"):  # the logarithm of a rate
                parameter.mul_(3.0)
    return model


def hmt_model(name: str = "llama", **settings: object) -> HMTForCausalLM:
    """An HMT around the named backbone: segments of 16 tokens, 3 sensory tokens, a queue of 3 memories."""
    settings = {"segment_length": 16, "num_sensory": 3, "queue_size": 3, **settings}
    return HMTForCausalLM.from_backbone(backbone(name), **settings)


def token_ids(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(seed))
