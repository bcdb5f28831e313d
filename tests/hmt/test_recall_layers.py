"""The projections of recall, whatever has been put in their place or hooked onto them."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones import hmt_model, token_ids
from torch import nn
from torch.nn.utils import prune

from hmt.compat import CrossAttentionMemory
from hmt.recall import MemoryRecall


class Doubled(nn.Module):
    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize("kind", [MemoryRecall, CrossAttentionMemory])
@pytest.mark.parametrize("which", ["wq", "wk"])
@pytest.mark.parametrize("how", ["replaced", "hooked", "pruned"])
def test_what_a_layer_computes_is_what_is_recalled_by(kind: type, which: str, how: str) -> None:
    recall, summary = kind(16, 24).double(), torch.randn(3, 16, dtype=torch.float64)
    layer = getattr(recall, which)
    if how == "replaced":
        setattr(recall, which, Doubled(layer))
    elif how == "hooked":
        layer.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        prune.random_unstructured(layer, "weight", 0.5)
    memory = torch.randn(5, 16, dtype=torch.float64)
    expected = recall.wq(summary) @ recall.wk(memory).T
    torch.testing.assert_close(recall.absorb(summary) @ memory.T, expected)


def test_lora_on_all_linear_layers_trains_recall_and_can_be_merged() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    model, ids = peft.get_peft_model(hmt_model().train(), config), token_ids(2, 85)
    model(input_ids=ids, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_weights_that_accelerate_brings_for_each_call() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = hmt_model().eval(), token_ids(2, 53)
    offloaded = copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(offloaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
