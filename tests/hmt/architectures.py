"""Every causal language model of transformers, small: which of them an HMT reads, trains and generates with.

python tests/hmt/architectures.py [KIND ...] prints a line for each.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hmt import HMTForCausalLM
from hmt.serving import step

VOCAB, LENGTH = 128, 40
LARGEST = 30_000_000  # parameters; what is still larger, these sizes do not make small
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 512),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 24),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "time_step_rank"), 8),
    **dict.fromkeys(("head_dim", "head_size", "d_kv", "kv_lora_rank", "mamba_d_head", "chunk_size"), 16),
    **dict.fromkeys(("mamba_chunk_size", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads", "mamba_expand"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "conv_kernel", "num_meta_tokens"), 4),
    **dict.fromkeys(("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"), 0.5),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), 0.5),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KEPT_IF_UNSET = {
    "sliding_window",
    "head_dim",
    "num_key_value_heads",
    "n_inner",
    "moe_intermediate_size",
    "q_lora_rank",
    "logit_scale",
}
HYBRID = ["linear_attention", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "granitemoehybrid": {"layer_types": HYBRID},
    "hunyuan_v1_dense": {"head_dim": 16, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"num_hidden_layers": None},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
              "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
               "attention_head_dim": 32, "mamba_headdim": 16, "mamba_ngroups": 1},
}  # fmt: skip


class NotSmallError(Exception):
    """No small model of this kind is known."""


class RefusedError(Exception):
    """from_backbone says why it cannot be read."""


def small_config(kind: str) -> PreTrainedConfig:
    config = AutoConfig.for_model(kind).get_text_config()
    fields = config.to_dict()
    sizes = {k: v for k, v in SIZES.items() if k in fields and not (fields[k] is None and k in KEPT_IF_UNSET)}
    if "layer_types" in fields:
        sizes["layer_types"] = None  # as many as there are layers
    if "kv_lora_rank" in fields:  # latent attention: widths of its own
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = 4
    sizes |= SPECIAL.get(kind, {})
    return type(config)(**{k: v for k, v in sizes.items() if v is not None or k == "layer_types"})


def small_model(kind: str) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """A model, two texts, and its own logits of them.

    Raises:
        NotSmallError: with the reason.
    """
    torch.manual_seed(0)
    try:
        config = small_config(kind)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise NotSmallError(f"{size / 1e6:.0f} million parameters")
        model = AutoModelForCausalLM.from_config(config).eval()
        ids = torch.randint(3, min(VOCAB, len(model.get_input_embeddings().weight)), (2, LENGTH))
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
    except NotSmallError:
        raise
    except Exception as error:
        raise NotSmallError(f"{type(error).__name__}: {error}") from error
    return model, ids, logits


def wrapped(model: PreTrainedModel, **settings: Any) -> HMTForCausalLM:
    torch.manual_seed(1)
    settings = {"segment_length": 16, "num_sensory": 4, "queue_size": 5, "summary_source": "previous", **settings}
    return HMTForCausalLM.from_backbone(copy.deepcopy(model), **settings).eval()


def check(kind: str) -> str:
    """Reads as the model itself, causally, in batches as alone; decodes what it scores; trains. Its attention.

    Raises:
        NotSmallError: it cannot be tried.
        RefusedError: likewise, with the reason.
        AssertionError: it does not work.
    """
    model, ids, expected = small_model(kind)
    try:
        bare = wrapped(model, mode="baseline", num_sensory=0, segment_length=64, summary_source="current")
    except ValueError as error:
        raise RefusedError(str(error)) from error
    hmt = wrapped(model)
    attention = hmt.backbone.config._attn_implementation
    with torch.no_grad():
        assert_same("a single segment", bare(ids).logits, expected)
        logits = hmt(ids).logits
        if attention == "hmt":
            assert_same("another attention", wrapped(model, attn_implementation="eager")(ids).logits, logits)
        later = torch.cat([ids[:, :30], ids[:, :10]], dim=1)
        assert_same("an earlier token", hmt(later).logits[:, :30], logits[:, :30])
        mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [21]])).long()
        assert_same("beside padding", hmt(ids, attention_mask=mask).logits[1:, :21], hmt(ids[1:, :21]).logits)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        out = hmt.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
        assert_same("decoded", torch.stack(out.logits, dim=1), hmt(out.sequences).logits[:, LENGTH - 1 : -1])
        beams = [hmt.generate(ids, num_beams=2, use_cache=cached, **options) for cached in (True, False)]
        assert torch.equal(*beams), "beams"
        assert_serves(hmt, ids)
    hmt.train()(ids, labels=ids).loss.backward()
    gradients = [p.grad for p in hmt.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients), "gradients"
    return attention


def assert_serves(hmt: HMTForCausalLM, ids: torch.Tensor) -> None:
    """Two documents at different positions, a part and a token at a time, as each alone."""
    texts = [ids[0], ids[1, :21]]
    states = [hmt.new_state(), hmt.new_state()]
    for part in (slice(0, 18), slice(18, 19), slice(19, 20), slice(20, 21)):
        logits, states = step(hmt, states, [text[part] for text in texts])
        for text, found in zip(texts, logits, strict=True):
            assert_same("served", found[-1], hmt(text[None, : part.stop]).logits[0, -1])


def assert_same(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < 1e-4, f"{what}: {error:.1e}"


def main() -> int:
    logging.set_verbosity_error()
    counts: dict[str, int] = {}
    for kind in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            result, why = "reads", check(kind)
        except NotSmallError as error:
            result, why = "not tried", str(error)
        except RefusedError as error:
            result, why = "refused", str(error)
        except Exception as error:
            result, why = "FAILS", f"{type(error).__name__}: {error}"
        counts[result] = counts.get(result, 0) + 1
        print(f"{kind:28}{result:11}{why.splitlines()[0] if why else ''}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    return 1 if "FAILS" in counts else 0


if __name__ == "__main__":
    sys.exit(main())
