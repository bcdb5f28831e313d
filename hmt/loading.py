"""Load any causal language model, local or from a hub, as an HMT with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hmt.adapters import backbone_of, is_adapter, load_adapter
from hmt.model import HMTForCausalLM


class Loaded(NamedTuple):
    """A model, its tokenizer, and whether its memory parameters are fresh random numbers."""

    model: HMTForCausalLM
    tokenizer: PreTrainedTokenizerBase
    untrained: bool


def load(name: str, *, dtype: torch.dtype | None = None, device: str | None = None, **settings: Any) -> Loaded:
    """An HMT from a directory or hub name: a saved HMT or adapter as it is, any other causal LM with new memory.

    Args:
        dtype: of the weights; None means bfloat16 on CUDA and float32 elsewhere.
        device: None means CUDA when there is one.
        settings: fields of `HMTConfig`; for a saved HMT they change how it reads, not what it has learnt.

    Raises:
        ValueError: a setting that a saved HMT cannot change, or a model that cannot work, with the reason.
        OSError: no such model, as transformers reports it.

    Example:
        >>> model, tokenizer, untrained = load("HuggingFaceTB/SmolLM2-135M", segment_length=512)
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    if is_adapter(name):
        model = load_adapter(name, dtype=dtype, **settings)
        while is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file():
            name = backbone_of(name)  # a small adapter may come without the tokenizer
        return Loaded(model.to(device).eval(), AutoTokenizer.from_pretrained(name), False)
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "hmt":
        for key in ("mode", "recall_dim"):
            if settings.get(key, getattr(config, key)) != getattr(config, key):
                raise ValueError(f"{key} of the saved model {name!r} is {getattr(config, key)!r} and cannot be changed")
        model = HMTForCausalLM.from_pretrained(name, dtype=dtype, **settings)
    else:
        backbone = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        torch.manual_seed(0)  # untrained memory, but the same one each time
        model = HMTForCausalLM.from_backbone(backbone, **settings)
    return Loaded(model.to(device).eval(), AutoTokenizer.from_pretrained(name), config.model_type != "hmt")


def encode_file(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [1, T] of a UTF-8 text file.

    Raises:
        ValueError: no such file, not UTF-8, or no token in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"FILE must be a text file, but there is no file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"FILE must be UTF-8 text, {str(path)!r} is not: {error}") from error
    # a book is longer than any tokenizer's model_max_length, and need not be shorter here
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] == 0:
        raise ValueError(f"FILE must hold text, {str(path)!r} has no token")
    return ids
