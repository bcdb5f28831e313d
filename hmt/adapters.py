"""What of a model is trained (everything, LoRA factors, or the memory alone), and small files of only that."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from hmt.backbone import is_quantised, load_weights, untie_head, unwrap
from hmt.model import HMTForCausalLM
from hmt.state_file import digest_of, digest_of_fields, write_whole

TRAINABLE = ("full", "lora", "memory")
FILE = "hmt_adapter.safetensors"
FORMAT, VERSION = "hmt_adapter", "1"
DIGEST = "metadata_sha256"  # of all other metadata; absent in the first files
FACTOR = re.compile(r"\.lora_(?:[AB]\.default\.weight|embedding_[AB]\.default)$")
WRAPPED = re.compile(r"\.(?:base_layer|original_module)\.")
KEEP_WEIGHTS = ("true", "false", "gaussian", "orthogonal", "eva", "mica")  # factors begin beside weights as they were
SETTINGS = (
    "mode",
    "segment_length",
    "num_sensory",
    "queue_size",
    "summary_fraction",
    "summary_source",
    "recall_dim",
    "recall_softmax_scale",
)


def select(
    model: HMTForCausalLM,
    what: str,
    *,
    rank: int = 8,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: list[str] | str | None = None,
) -> int:
    """Make "full", "lora" or "memory" what requires gradients, and return the number of these parameters.

    Args:
        what: "full": every parameter; "memory": only what HMT adds to its backbone; "lora": that, and low-rank factors
            (arXiv 2106.09685) that the package `peft` puts beside the backbone's frozen layers.
        rank, alpha, dropout, target_modules: of LoRA; target_modules None means PEFT's choice for the architecture.

    Raises:
        ValueError: another `what`; "memory" for a baseline, which has none; "full" for a quantised backbone.
        ImportError: "lora" without the package `peft`.
    """
    if what not in TRAINABLE:
        raise ValueError(f"what must be one of {TRAINABLE}, got {what!r}")
    if what == "memory" and model.config.mode == "baseline":
        raise ValueError(
            "what must be 'full' or 'lora' for mode 'baseline', which has no memory to train, got 'memory'"
        )
    quantised = is_quantised(model.backbone)
    if what == "full" and quantised:
        raise ValueError("what must be 'lora' or 'memory' for a quantised backbone, got 'full'")
    for name, p in model.named_parameters():
        p.requires_grad_(what == "full" or not name.startswith("backbone."))
    if what == "lora":
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("what='lora' needs the package `peft`: pip install peft") from error
        settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules)
        with warnings.catch_warnings():  # of its own correction for the transposed layers of GPT-2
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            inject_adapter_in_model(settings, model.backbone)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_adapter(
    model: HMTForCausalLM, directory: str | Path, backbone: str, *, dtype: torch.dtype | None = None
) -> None:
    """Write what was trained, the memory, and how to read with them, into one small file of a directory.

    That is what `select` left to train, or the LoRA factors that PEFT has put in; a PeftModel will do.

    Args:
        backbone: directory or hub name for `load_adapter` of what was trained on: a language model, or an HMT or
            adapter, of which the backbone is used. A directory is remembered from the root.
        dtype: of the numbers in the file, torch.bfloat16 for one of half the size; None keeps the model's.

    Raises:
        ValueError: a directory that `check_directory` refuses; a model with anything of PEFT's but plain LoRA.
    """
    check_directory(directory, backbone)
    model = unwrap(getattr(model, "_orig_mod", model))  # of torch.compile
    if Path(backbone).is_dir():
        backbone = os.path.abspath(backbone)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in _trained(model).items()}
    scales = {name: m.scaling["default"] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    metadata = {
        "version": VERSION,
        "backbone": backbone,
        "settings": {name: getattr(model.config, name) for name in SETTINGS},
        "lora": scales,
        "sha256": {name: digest_of(name, tensor) for name, tensor in tensors.items()},
    }
    metadata[DIGEST] = digest_of_fields(metadata)
    Path(directory).mkdir(parents=True, exist_ok=True)
    # one entry, because safetensors writes several in random order: equal adapters are equal files
    write_whole(Path(directory) / FILE, save(tensors, {FORMAT: json.dumps(metadata)}))


def _trained(model: HMTForCausalLM) -> dict[str, nn.Parameter]:
    """What requires gradients, and the memory and factors even if they are frozen, by name.

    Raises:
        ValueError: what `load_adapter` could not put back.
    """
    if (found := next(_unfit(model), None)) is not None:
        raise ValueError(
            f"an adapter must be whole weights or plain LoRA factors of the backbone, got {found}: PEFT's "
            "save_pretrained keeps that, or merge_and_unload() makes it a model to save"
        )
    parameters = model.named_parameters()
    return {n: p for n, p in parameters if p.requires_grad or FACTOR.search(n) or not n.startswith("backbone.")}


def _unfit(model: HMTForCausalLM) -> Iterator[str]:
    """What PEFT has put into a model that an adapter does not hold."""
    for config in [c for module in model.modules() for c in vars(module).get("peft_config", {}).values()]:
        start, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
        if str(start).lower() not in KEEP_WEIGHTS:
            yield f"init_lora_weights={start!r}, which changes weights"
        if bias != "none":
            yield f"bias={bias!r}"
    layers = dict(model.named_modules())
    tuned = tuple(f"{name}." for name, layer in layers.items() if hasattr(layer, "adapter_layer_names"))
    for name, parameter in model.named_parameters():
        if name.startswith(tuned):
            beside = name.startswith("backbone.")
            as_before = beside and not parameter.requires_grad and WRAPPED.search(name)
            if not as_before and not (beside and FACTOR.search(name)):
                yield name
    for name, layer in layers.items():
        if hasattr(layer, "lora_A"):
            plain = isinstance(layer.get_base_layer(), (nn.Linear, Conv1D, nn.Embedding))
            if not plain or getattr(layer, "lora_variant", None):
                yield name
    head = model.get_output_embeddings()
    if hasattr(head, "lora_A") and _shares_weights(model) and head.weight.requires_grad:
        yield "factors of a head whose weights are trained as the embedding's"


def _shares_weights(model: PreTrainedModel) -> bool:
    """Whether the LM head has the weights of the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def load_adapter(
    directory: str | Path, backbone: PreTrainedModel | None = None, *, dtype: torch.dtype | None = None, **settings: Any
) -> HMTForCausalLM:
    """The model of `save_adapter`; LoRA factors are merged into the backbone, which needs no `peft`.

    Args:
        backbone: the model that was trained on; its weights are changed, unless the adapter is refused. None loads it
            by the name in the file.
        settings: fields of `HMTConfig` to read with, in place of those in the file.

    Raises:
        ValueError: a damaged or foreign file, or one that does not fit the backbone, with the reason; a directory on
            the way to its backbone that is gone.
    """
    path = Path(directory) / FILE
    tensors, metadata = _read(path)
    stored = metadata["settings"]
    for key in ("mode", "recall_dim"):
        if settings.get(key, stored[key]) != stored[key]:
            raise ValueError(f"{key} of the adapter {str(path)!r} is {stored[key]!r} and cannot be changed")
    if backbone is None:
        name = bases(directory)[1]
        base = (
            load_adapter(name, dtype=dtype)
            if is_adapter(name)
            else load_weights(AutoModelForCausalLM, name, dtype=dtype)
        )
        backbone = base
        if isinstance(base, HMTForCausalLM):
            backbone = base.backbone
            backbone.generation_config = base.generation_config  # the saved one
    updates = _updates(backbone, tensors, metadata["lora"], path)
    model = HMTForCausalLM.from_backbone(backbone, **{**stored, **settings})
    expected = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    found = {name for name in tensors if not name.startswith("backbone.")}
    if found != expected:
        raise ValueError(f"{str(path)!r} does not fit: it should hold {sorted(expected)}, but holds {sorted(found)}")
    try:
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} does not fit the backbone {type(backbone).__name__}: {error}") from error
    if unknown:
        raise ValueError(f"{str(path)!r} does not fit the backbone {type(backbone).__name__}: it has no {unknown[0]}")
    for update in updates:  # last, when nothing can be refused any more: who tries again must not add them twice
        update.add()
    return model


def check_directory(directory: str | Path, backbone: str) -> None:
    """Before long work: can an adapter of this backbone be written there?

    Raises:
        ValueError: a directory of what the adapter needs, or of a whole model.
    """
    if Path(directory).resolve() in (Path(name).resolve() for name in bases(backbone)):
        raise ValueError(f"an adapter of {backbone!r} must go to another folder than what it needs: {str(directory)!r}")
    if (Path(directory) / CONFIG_NAME).is_file():
        raise ValueError(f"an adapter must go to another folder than that of a whole model: {str(directory)!r}")


def is_adapter(directory: str | Path) -> bool:
    """Whether `save_adapter` has written into this directory.

    Raises:
        ValueError: a directory that holds a whole model as well: which of the two is meant, nobody knows.
    """
    if not (Path(directory) / FILE).is_file():
        return False
    if (Path(directory) / CONFIG_NAME).is_file():
        raise ValueError(
            f"{str(directory)!r} must hold a whole model or an adapter, but has both {CONFIG_NAME} and {FILE}: "
            "move one of them to a folder of its own"
        )
    return True


def settings_of(directory: str | Path) -> dict[str, Any]:
    """How an adapter reads: fields of `HMTConfig`.

    Raises:
        ValueError: a damaged or foreign file, with the reason.
    """
    return _read(Path(directory) / FILE)[1]["settings"]


def bases(name: str | Path) -> list[str]:
    """What a model is made of: its directory, that of what this adapter was trained on, and so on to what is none.

    Raises:
        ValueError: a damaged or foreign file, with the reason; adapters trained on each other; a directory that is
            gone.
    """
    found = [str(name)]
    while is_adapter(found[-1]):
        below = _read(Path(found[-1]) / FILE)[1]["backbone"]
        if Path(below).is_absolute() and not Path(below).is_dir():
            raise ValueError(
                f"the adapter {found[-1]!r} was trained on {below!r}, which is not there: put that model there again, "
                "or give it to load_adapter as backbone="
            )
        if Path(below).resolve() in (Path(other).resolve() for other in found):
            raise ValueError(f"adapters must end in a language model, but {', '.join([*found, below])} go round")
        found.append(below)
    return found


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, TypeError, OverflowError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error
    if DIGEST in metadata and metadata.pop(DIGEST) != digest_of_fields(metadata):
        raise ValueError(f"{str(path)!r} is damaged: its metadata does not match its SHA-256")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} must be an HMT adapter of version {VERSION!r}, got version {metadata.get('version')!r}"
        )
    if set(metadata["sha256"]) != set(tensors):
        raise ValueError(f"{str(path)!r} is damaged: it should hold {sorted(metadata['sha256'])}")
    for name, tensor in tensors.items():
        if metadata["sha256"][name] != digest_of(name, tensor):
            raise ValueError(f"{str(path)!r} is damaged: tensor {name!r} does not match its SHA-256")
    return tensors, metadata


class _Update(NamedTuple):
    """W + scale B A of a layer."""

    layer: nn.Module
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool

    @torch.no_grad()
    def add(self) -> None:
        update = self.scale * (self.b @ self.a)
        weight = cast(torch.Tensor, self.layer.weight)
        weight += (update.T if self.transposed else update).to(weight)


def _updates(
    backbone: PreTrainedModel, tensors: dict[str, torch.Tensor], scales: dict[str, float], path: Path
) -> list[_Update]:
    """Those of all adapted layers; their factors are taken out of `tensors`, and a shared head gets its own weights."""
    modules = dict(unwrap(backbone).named_modules())
    ends = (backbone.get_output_embeddings(), backbone.get_input_embeddings())
    updates = []
    for name, scale in scales.items():
        embeds = f"{name}.lora_embedding_A.default" in tensors
        keys = [f"{name}.lora_embedding_{x}.default" if embeds else f"{name}.lora_{x}.default.weight" for x in "AB"]
        a, b = (tensors.pop(key).float() for key in keys)
        layer = modules.get(name.removeprefix("backbone."))
        if not getattr(layer, "weight", a).is_floating_point():
            raise ValueError(
                f"{str(path)!r} holds LoRA factors, which cannot be added to quantised weights, as those of "
                f"{name}: load it with the backbone as it was before"
            )
        transposed = embeds or isinstance(layer, Conv1D)  # GPT-2's linear layer, as an embedding is
        shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        kinds = nn.Embedding if embeds else (nn.Linear, Conv1D)
        if not isinstance(layer, kinds) or layer.weight.shape != shape or a.shape[0] != b.shape[1]:
            kind = "embedding" if embeds else "linear layer"
            raise ValueError(f"{str(path)!r} does not fit the backbone {type(backbone).__name__}: no {kind} {name}")
        updates.append(_Update(layer, a, b, scale, transposed))
    if any(update.layer in ends for update in updates) and _shares_weights(backbone):
        untie_head(backbone)  # the factors were those of one of them alone
    return updates
