"""Ten thousand segments: no growth of memory, no NaN, and the state as small as at the start."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from backbones import SHAPE
from transformers import AutoModelForCausalLM, LlamaConfig

from hmt import HMTForCausalLM, serving

SEGMENTS, LENGTH, AT_ONCE = 10_000, 4, 250


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def model() -> HMTForCausalLM:
    config = LlamaConfig(**{**SHAPE, "hidden_size": 16, "num_hidden_layers": 1}, intermediate_size=16)
    backbone = AutoModelForCausalLM.from_config(config).eval()
    return HMTForCausalLM.from_backbone(
        backbone, segment_length=LENGTH, num_sensory=1, queue_size=8, summary_batch_size=64
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@torch.no_grad()
def test_memory_does_not_grow_over_ten_thousand_segments(model: HMTForCausalLM) -> None:
    state, resident = None, []
    for number in range(SEGMENTS // AT_ONCE):
        ids = torch.randint(3, 128, (1, AT_ONCE * LENGTH))
        if number % 10 == 9:  # by other ways in: logits of all tokens, then decoding in a batch of documents
            out = model(ids[:, : -3 * LENGTH], state=state)
            assert out.logits.isfinite().all()
            (logits,), (state,) = serving.step(model, [out.state], [ids[0, -3 * LENGTH :]])
            assert logits.isfinite().all()
        else:
            state = model.read(ids, state)
        assert state.queue.isfinite().all() and state.queue.shape == (1, 8, 16)
        gc.collect()
        resident.append(resident_bytes())
    assert state.num_closed == SEGMENTS and state.num_open == 0
    settled = resident[len(resident) // 4]  # pools of allocators have their size by then
    assert resident[-1] <= 1.01 * settled, f"{settled} bytes after a quarter, {resident[-1]} at the end"
