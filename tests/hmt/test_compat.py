"""hmt.compat where no recorded case reaches: prompts cut from the right, whose first segment may be short."""

from __future__ import annotations

import math

import pytest
import torch
from backbones import backbone, token_ids

from hmt.compat import MemoryCell, RecurrentWrapper


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["left", "right", "center"])
@pytest.mark.parametrize("length", [18, 40, 48])
def test_a_long_continuation_begins_as_a_short_one(length: int, alignment: str) -> None:
    """Up to segment_size - k new tokens come from one pass over the last segment, more from the recurrence."""
    torch.manual_seed(0)
    model = backbone()
    wrapper = RecurrentWrapper(
        MemoryCell(model, 1, 6), emb=model.get_input_embeddings(), word_emb_dim=64, hidden_dim=64, ltm_context=3,
        segment_size=16, max_n_segments=64, segment_alignment=alignment,
    ).eval()  # fmt: skip
    ids, greedy = token_ids(2, length), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    short, long = (wrapper.generate(ids, None, 16, max_new_tokens=count, **greedy) for count in (10, 30))
    parts = math.ceil(length / 16)
    last = {"left": length - 16 * (parts - 1), "right": 16, "center": length - math.ceil(length / parts) * (parts - 1)}
    same = min(10, 16 - last[alignment])  # tokens that the last segment still takes
    assert long.shape == (2, 30) and torch.equal(long[:, :same], short[:, :same])
