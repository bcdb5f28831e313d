"""HMT-pytorch itself as a provider, from the checkout that the environment variable HMT_PYTORCH names."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers.generation  # looks for scikit-learn, and must not find the stand-in  # noqa: F401
from torch import Tensor

from hmt import HMTForCausalLM


def missing() -> str | None:
    """Why HMT-pytorch cannot be measured here (None: it can)."""
    folder = os.environ.get("HMT_PYTORCH")
    if not folder:
        return "HMT_PYTORCH does not name a checkout of github.com/OswaldHe/HMT-pytorch"
    if not (Path(folder) / "modeling_rmt" / "language_modeling.py").is_file():
        return f"HMT_PYTORCH={folder} holds no modeling_rmt/language_modeling.py"
    return None


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Modules that HMT-pytorch imports for metrics, logging and checkpoints; one of them would use the network."""
    contents: dict[str, dict[str, Any]] = {
        "evaluate": {"load": lambda name: None},
        "deepspeed": {},
        "deepspeed.utils": {},
        "deepspeed.utils.zero_to_fp32": {"get_fp32_state_dict_from_zero_checkpoint": None},
        "sklearn": {},
        "sklearn.metrics": {
            "accuracy_score": lambda *_: 0.0,
            "precision_recall_fscore_support": lambda *_, **__: (0.0, 0.0, 0.0, None),
        },
    }
    if importlib.util.find_spec("accelerate") is None:
        contents |= {"accelerate": {}, "accelerate.logging": {"get_logger": lambda name: None}}
    added = [name for name in contents if name not in sys.modules]
    for name in added:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)  # whoever looks for it asks for one
        vars(sys.modules[name]).update(contents[name])
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


@contextlib.contextmanager
def cuda_calls_allowed() -> Iterator[None]:
    """It calls .cuda() on every tensor: on a machine without a GPU that has to do nothing."""
    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self):
        yield


def build(model: HMTForCausalLM, max_segments: int) -> Any:
    """Its RecurrentWrapper with the weights of `model`; it keeps the logits of all segments, as scoring needs."""
    # it draws its parameters on the device that is the default, and scales them by the embeddings' deviation
    device, path = model.memory.device, [os.environ["HMT_PYTORCH"], *sys.path]
    with stand_ins(), mock.patch.object(sys, "path", path), device:
        modeling = importlib.import_module("modeling_rmt.language_modeling")
        config = model.config
        cell = modeling.MemoryCell(model.backbone, 1, config.num_sensory)
        wrapper = modeling.RecurrentWrapper(
            cell,
            emb=model.get_input_embeddings(),
            word_emb_dim=config.hidden_size,
            hidden_dim=config.recall_dim,
            ltm_context=config.queue_size,
            segment_size=config.segment_length,
            max_n_segments=max_segments,
            mask_size=max_segments * config.segment_length,
            n_cell_out=max_segments,
        )
    cell.memory.data, wrapper.mem.data = model.memory.detach().clone(), model.summary_prompt.detach().clone()
    with torch.no_grad():
        wrapper.cross_attn.wq.weight.copy_(model.recall.wq.weight)  # bfloat16 in HMT-pytorch, whatever the model is
        wrapper.cross_attn.wk.weight.copy_(model.recall.wk.weight)
    return wrapper.eval().to(device)


@contextlib.contextmanager
def _memories(wrapper: Any) -> Iterator[list[Tensor]]:
    """Collects the memory of every main pass; the cell runs summary and main pass by turns."""
    seen: list[Tensor] = []
    memories: list[Tensor] = []

    def collect(module: Any, inputs: Any, output: tuple[Any, Tensor, Any]) -> None:
        seen.append(output[1])
        if len(seen) % 2 == 0:
            memories.append(output[1])

    handle = wrapper.memory_cell.register_forward_hook(collect)
    try:
        yield memories
    finally:
        handle.remove()


def read(wrapper: Any, ids: Tensor, segment_length: int) -> Tensor:
    """Memories [1, S, d] of a prompt; only its generate() reads prompts, so one token after this one is generated.

    None where the prompt is shorter than a segment: S = 0 and d = 0.
    """
    ids = torch.cat([ids, ids[:, :1]], dim=1)  # the open segment that it starts from
    with cuda_calls_allowed(), _memories(wrapper) as memories:
        wrapper.generate(ids, torch.ones_like(ids), segment_length, max_new_tokens=1, pad_token_id=0)
    return torch.cat(memories, dim=1) if memories else torch.empty(1, 0, 0)


def score(wrapper: Any, ids: Tensor, segment_length: int) -> tuple[Tensor, Tensor]:
    """Loss over a text and the memories [1, S, d]."""
    with cuda_calls_allowed(), _memories(wrapper) as memories:
        out, _ = wrapper(ids, labels=ids, attention_mask=torch.ones_like(ids), segment_size=segment_length)
    return out.loss, torch.cat(memories, dim=1)
