"""Weights of HMT-pytorch: read its .pth files into an HMTForCausalLM."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hmt.backbone import untie_head
from hmt.model import HMTForCausalLM

PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
BACKBONE = re.compile(r"^memory_cell\.model\.(?:base_model\.model\.)?")
LORA = re.compile(r"^(?P<layer>.*)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.[^.]+)*$")
OWN = {
    "mem": "summary_prompt",
    "memory_cell.memory": "memory",
    "cross_attn.wq.weight": "recall.wq.weight",
    "cross_attn.wk.weight": "recall.wk.weight",
}
UNUSED = re.compile(r"^memory_cell\.mem_map\.")


def load_hmt_pytorch(
    source: str | Path | Mapping[str, Tensor],
    backbone: PreTrainedModel,
    *,
    lora_alpha: float | None = None,
    **settings: Any,
) -> HMTForCausalLM:
    """An HMTForCausalLM with the weights of a HMT-pytorch checkpoint; LoRA factors are merged, W + alpha/r B A.

    The mode follows from the keys: `mem` and `cross_attn.*` make an HMT, `memory_cell.memory` alone an RMT (its
    "stage 1"), neither the baseline. Recall of width h >= 4096 over embeddings of width d >= 4096 keeps the scale 1/h
    that it was trained with.

    Args:
        source: a .pth or .safetensors file, or a state_dict.
        backbone: a model of the checkpoint's architecture; its weights are overwritten by those in the file.
        lora_alpha: required when the checkpoint holds LoRA factors (HMT-pytorch trains with 32).
        settings: `segment_length`, `num_sensory`, `queue_size` and the like, which the files do not record.

    Raises:
        ValueError: keys that belong to no HMT-pytorch checkpoint or not to this backbone, LoRA without lora_alpha.
        TypeError: a file that holds no state_dict.

    Example:
        >>> model = load_hmt_pytorch("model_weights.pth", backbone, segment_length=1022, num_sensory=32, queue_size=300)
    """
    weights = {PREFIXES.sub("", key): value for key, value in _read(source).items()}
    own = {OWN[key]: weights.pop(key) for key in OWN if key in weights}
    weights = {key: value for key, value in weights.items() if not UNUSED.match(key)}
    foreign = [key for key in weights if not BACKBONE.match(key)]
    if foreign:
        raise ValueError(f"source is no HMT-pytorch checkpoint: unknown keys {_some(foreign)}")
    transposed = {name for name, module in backbone.named_modules() if isinstance(module, (nn.Embedding, Conv1D))}
    stripped = {BACKBONE.sub("", key): value for key, value in weights.items()}
    weights, adapted = _merge_lora(stripped, lora_alpha, transposed)
    for key, source_key in dict(getattr(backbone, "all_tied_weights_keys", {})).items():
        if key in adapted or source_key in adapted:  # the factors were those of one of them alone
            if source_key in adapted:
                weights.setdefault(key, adapted[source_key])
            untie_head(backbone)

    settings.setdefault("mode", "hmt" if "summary_prompt" in own else "rmt" if "memory" in own else "baseline")
    if "recall.wq.weight" in own:
        h, d = own["recall.wq.weight"].shape
        settings.setdefault("recall_dim", h)
        if h >= 4096 and d >= 4096:
            settings.setdefault("recall_softmax_scale", 1.0 / h)
    tied = set(getattr(backbone, "all_tied_weights_keys", {}))
    _check_fit(f"the backbone {type(backbone).__name__}", backbone, weights, lambda key: key not in tied and weights)
    model = HMTForCausalLM.from_backbone(backbone, **settings)
    _check_fit(f"mode {settings['mode']!r}", model, own, lambda key: not key.startswith("backbone."))
    backbone.load_state_dict(weights, strict=False)  # last: who is refused keeps the backbone's own
    model.load_state_dict(own, strict=False)
    return model


def _check_fit(what: str, module: nn.Module, weights: Mapping[str, Tensor], needs: Callable[[str], object]) -> None:
    """Raise a ValueError unless a module has a place of the right shape for all weights, and gets all that it needs."""
    places = module.state_dict()
    unexpected = [key for key in weights if key not in places]
    absent = [key for key in places if key not in weights and needs(key)]
    if unexpected or absent:
        raise ValueError(
            f"source does not fit {what}: unexpected keys {_some(unexpected)}, missing keys {_some(absent)}"
        )
    for key, value in weights.items():
        if value.shape != places[key].shape:
            raise ValueError(
                f"source does not fit {what}: {key} has the shape {list(value.shape)}, not {list(places[key].shape)}"
            )


def _read(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"source must be a file or a state_dict, but there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"source must be a file of torch.save, {str(path)!r} is damaged or none: {reason}") from error
    if not isinstance(weights, Mapping):
        raise TypeError(f"source must hold a state_dict, {str(path)!r} holds a {type(weights).__name__}")
    return weights


def _merge_lora(
    weights: dict[str, Tensor], alpha: float | None, transposed: Set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights with W + alpha/r B A where there are factors; and of the layers that have some, W as it was."""
    factors: dict[str, dict[str, Tensor]] = {}
    merged = {}
    for key, value in weights.items():
        if match := LORA.match(key):
            pair = factors.setdefault(match["layer"], {})
            if match["factor"] in pair or key.endswith(".bias"):
                raise ValueError(
                    f"source must hold one pair of LoRA factors of a layer and no biases, got {key} as well"
                )
            pair[match["factor"]] = value
        else:
            merged[key.replace(".base_layer.", ".")] = value
    if factors and alpha is None:
        raise ValueError(f"lora_alpha is required: the checkpoint holds LoRA factors of {len(factors)} layers")
    torn = [layer for layer, pair in factors.items() if len(pair) < 2 or f"{layer}.weight" not in merged]
    if torn:
        raise ValueError(f"source must hold lora_A, lora_B and the weight of a layer, but lacks some of {_some(torn)}")
    adapted = {f"{layer}.weight": merged[f"{layer}.weight"] for layer in factors}
    for layer, pair in factors.items():
        key = f"{layer}.weight"
        weight, rank = merged[key], pair["A"].shape[0]
        update = (cast(float, alpha) / rank) * (pair["B"].float() @ pair["A"].float())
        merged[key] = (weight.float() + (update.T if layer in transposed else update)).to(weight.dtype)
    return merged, adapted


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3]) or "none"
    return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
