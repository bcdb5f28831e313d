"""Load any causal language model, local or from a hub, as an HMT with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hmt.adapters import SETTINGS, bases, is_adapter, load_adapter, settings_of
from hmt.backbone import load_weights
from hmt.model import HMTForCausalLM


class Loaded(NamedTuple):
    """A model, its tokenizer, and whether its memory parameters are fresh random numbers."""

    model: HMTForCausalLM
    tokenizer: PreTrainedTokenizerBase
    untrained: bool


def load(
    name: str, *, dtype: torch.dtype | None = None, device: str | None = None, seed: int = 0, **settings: Any
) -> Loaded:
    """An HMT from a directory or hub name: a saved HMT or adapter as it is, any other causal LM with new memory.

    Args:
        dtype: of the weights; None means bfloat16 on CUDA and float32 elsewhere.
        device: None means CUDA when there is one.
        seed: of new memory parameters, which are the same each time; PyTorch's own random numbers stay as they are.
        settings: fields of `HMTConfig`; for a saved HMT they change how it reads, not what it has learnt.

    Raises:
        ValueError: a setting that a saved HMT cannot change, a model that cannot work or lacks weights, with the
            reason; a device that is not there.
        OSError: no such model, as transformers reports it.

    Example:
        >>> model, tokenizer, untrained = load("HuggingFaceTB/SmolLM2-135M", segment_length=512)
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    if is_adapter(name):
        model = load_adapter(name, dtype=dtype, **settings)
        *adapters, base = bases(name)  # a small adapter may come without the tokenizer
        name = next((x for x in adapters if (Path(x) / "tokenizer_config.json").is_file()), base)
        return Loaded(model.to(device).eval(), AutoTokenizer.from_pretrained(name), False)
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "hmt":
        for key in ("mode", "recall_dim"):
            if settings.get(key, getattr(config, key)) != getattr(config, key):
                raise ValueError(f"{key} of the saved model {name!r} is {getattr(config, key)!r} and cannot be changed")
        model = load_weights(HMTForCausalLM, name, dtype=dtype, **settings)
    else:
        backbone = load_weights(AutoModelForCausalLM, name, dtype=dtype)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = HMTForCausalLM.from_backbone(backbone, **settings)
    return Loaded(model.to(device).eval(), AutoTokenizer.from_pretrained(name), config.model_type != "hmt")


def _check_device(device: str) -> None:
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("no weights can be there")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one of this machine and this PyTorch, got {device!r}: {reason}") from error


def stored_settings(name: str) -> dict[str, Any]:
    """Without loading any weights: the settings that a saved HMT or adapter reads with; {} for another causal LM.

    Raises:
        ValueError: a damaged adapter, with the reason.
        OSError: no such model, as transformers reports it.
    """
    if is_adapter(name):
        stored_settings(bases(name)[-1])
        return settings_of(name)
    config = AutoConfig.from_pretrained(name)
    return {key: getattr(config, key) for key in SETTINGS} if config.model_type == "hmt" else {}
