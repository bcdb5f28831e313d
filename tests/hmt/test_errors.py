"""What the model layer refuses, with an error that names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import backbone, hmt_model, token_ids
from transformers import LlamaModel

from hmt import HMTConfig, HMTForCausalLM, serving

INTS = torch.ones(1, 9, dtype=torch.long)
META = torch.device("meta")

# what is replaced, the error, a part of its message
READ = {
    "state-list": ({"state": lambda m: [m.new_state()]}, TypeError, "state must be an HMTState, got a list: "),
    "ids-none": ({"input_ids": None}, TypeError, "input_ids must be an integer tensor .*got NoneType"),
    "ids-list": ({"input_ids": [[1]]}, TypeError, "input_ids must be an integer tensor .*got list"),
    "ids-float": ({"input_ids": INTS.float()}, ValueError, r"input_ids must .*got torch.float32 \(1, 9\)"),
    "ids-bool": ({"input_ids": INTS.bool()}, ValueError, "input_ids must .*got torch.bool"),
    "ids-short": ({"input_ids": INTS.to(torch.int16)}, ValueError, "input_ids must .*got torch.int16"),
    "ids-rank": ({"input_ids": INTS[0]}, ValueError, r"input_ids must be an integer tensor \[B, T\], got .*\(9,\)"),
    "ids-empty": ({"input_ids": INTS[:, :0]}, ValueError, "input_ids must hold at least one token"),
    "mask-list": ({"attention_mask": [1] * 9}, TypeError, "attention_mask must be a tensor .*got list"),
    "mask-shape": ({"attention_mask": INTS[:, :3]}, ValueError, r"attention_mask must have the shape \(1, 9\)"),
    "mask-rank": ({"attention_mask": INTS[None]}, ValueError, "attention_mask must have the shape"),
    "mask-device": ({"attention_mask": INTS.to(META)}, ValueError, "attention_mask must be on .*cpu .*got meta"),
    "state-type": ({"state": {"queue": INTS}}, TypeError, "state must be an HMTState, got dict"),
    "state-rows": ({"state": lambda m: m.new_state(3)}, ValueError, "state has 3 rows, but input_ids has 1"),
    "state-width": ({"state": lambda m: hmt_model("opt-projected").new_state()}, ValueError, "memories of width 48"),
    "state-mode": (
        {"state": lambda m: hmt_model(mode="baseline").new_state()},
        ValueError,
        "not how mode 'hmt' remembers",
    ),
    "state-device": ({"state": lambda m: m.new_state().to(META)}, ValueError, "state is on meta, but input_ids on cpu"),
}
FORWARD = READ | {
    "labels-list": ({"labels": [1] * 9}, TypeError, "labels must be a tensor .*got list"),
    "labels-float": ({"labels": INTS.float()}, TypeError, "labels must be int64, got torch.float32"),
    "labels-int32": ({"labels": INTS.int()}, TypeError, "labels must be int64, got torch.int32"),
    "labels-shape": ({"labels": INTS[:, 1:]}, ValueError, "labels must have the shape"),
    "shift_labels-dtype": ({"shift_labels": INTS.bool()}, TypeError, "shift_labels must be int64, got torch.bool"),
    "shift_labels-shape": ({"shift_labels": INTS[:, 1:]}, ValueError, "shift_labels must have the shape"),
    "keep-negative": ({"logits_to_keep": -1}, ValueError, "logits_to_keep must be an integer >= 0 or None, got -1"),
    "keep-float": ({"logits_to_keep": 2.0}, ValueError, "logits_to_keep must be an integer >= 0 or None, got 2.0"),
    "state-list": ({"state": lambda m: [m.new_state()]}, ValueError, "a list of states needs logits_to_keep >= 1"),
    "states-empty": ({"state": [], "logits_to_keep": 1}, ValueError, "state has 0 states, but input_ids has 1 rows"),
    "states-labels": ({"state": lambda m: [m.new_state()], "labels": INTS}, ValueError, "takes no labels"),
    "unknown": ({"position_ids": INTS}, TypeError, "forward does not take position_ids"),
}
STEP = {
    "states-none": ({"states": []}, ValueError, "states and tokens must be as many, at least one, got 0 and 1"),
    "states-type": ({"states": ["book"]}, TypeError, "states must be HMTStates .*got str and Tensor at 0"),
    "states-rows": ({"states": lambda m: [m.new_state(2)]}, ValueError, "states must have one row each, got 2 at 0"),
    "states-mode": ({"states": lambda m: [hmt_model(mode="baseline").new_state()]}, ValueError, "not how mode 'hmt'"),
    "states-device": ({"states": lambda m: [m.new_state().to(META)]}, ValueError, "state is on meta"),
    "tokens-number": ({"tokens": [INTS[0], INTS[0]]}, ValueError, "got 1 and 2"),
    "tokens-list": ({"tokens": [[1]]}, TypeError, "got HMTState and list at 0"),
    "tokens-float": ({"tokens": [INTS[0].float()]}, ValueError, "tokens must be integer tensors .*torch.float32"),
    "tokens-bool": ({"tokens": [INTS[0].bool()]}, ValueError, "tokens must be integer tensors .*torch.bool"),
    "tokens-rank": ({"tokens": [INTS]}, ValueError, r"tokens must be integer tensors \[t\]"),
    "tokens-empty": ({"tokens": [INTS[0, :0]]}, ValueError, "t >= 1"),
    "keep-negative": ({"logits_to_keep": -1}, ValueError, "logits_to_keep must be an integer >= 0, got -1"),
    "keep-none": ({"logits_to_keep": None}, ValueError, "logits_to_keep must be an integer >= 0, got None"),
}
SETTINGS = {
    "mode": "lstm",
    "summary_source": None,
    "segment_length": 16.0,
    "num_sensory": 17,
    "queue_size": "300",
    "summary_fraction": "half",
    "recall_dim": 1.5,
    "recall_softmax_scale": float("nan"),
    "fused_rotary": 1,
    "summary_batch_size": True,
    "loss_chunk_size": True,
    "rematerialize": None,
    "bptt_depth": -1,
    "offload_states": "cpu",
}


def fill_in(arguments: dict[str, Any], model: HMTForCausalLM) -> dict[str, Any]:
    return {name: value(model) if callable(value) else value for name, value in arguments.items()}


@pytest.mark.parametrize("case", FORWARD)
def test_forward(case: str) -> None:
    (replaced, error, message), model = FORWARD[case], hmt_model()
    with pytest.raises(error, match=message):
        model(**{"input_ids": token_ids(1, 9)} | fill_in(replaced, model))


@pytest.mark.parametrize("case", READ)
def test_read(case: str) -> None:
    (replaced, error, message), model = READ[case], hmt_model()
    with pytest.raises(error, match=message):
        model.read(**{"input_ids": token_ids(1, 9)} | fill_in(replaced, model))


@pytest.mark.parametrize("case", STEP)
def test_step(case: str) -> None:
    (replaced, error, message), model = STEP[case], hmt_model()
    with pytest.raises(error, match=message):
        serving.step(model, **{"states": [model.new_state()], "tokens": [INTS[0]]} | fill_in(replaced, model))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        HMTConfig(**{"segment_length": 16, "num_sensory": 3} | {name: SETTINGS[name]})


@pytest.mark.parametrize("name", SETTINGS)
def test_from_backbone(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        hmt_model(**{name: SETTINGS[name]})


def test_from_backbone_refuses_what_is_no_backbone_and_no_setting() -> None:
    with pytest.raises(TypeError, match="settings must be fields of HMTConfig, got segment_lenght"):
        HMTForCausalLM.from_backbone(backbone(), segment_lenght=512)
    with pytest.raises(ValueError, match="backbone must have an LM head"):
        HMTForCausalLM.from_backbone(LlamaModel(backbone().config))


@torch.no_grad()
def test_a_backbone_of_nan_is_not_called_something_else() -> None:
    """`hmt.checking` names the weight."""
    model = backbone()
    model.get_output_embeddings().weight.fill_(torch.nan)
    assert HMTForCausalLM.from_backbone(model)(token_ids(1, 10)).logits.isnan().all()


@torch.no_grad()
def test_a_head_whose_weight_is_a_method() -> None:
    """As that of PyTorch's dynamically quantised layers."""

    class Head(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.hidden = [linear]

        def weight(self) -> torch.Tensor:
            return self.hidden[0].weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.hidden[0](x)

    model = backbone()
    ids = token_ids(1, 10)
    expected = model(ids).logits
    model.lm_head = Head(model.lm_head)
    hmt = HMTForCausalLM.from_backbone(model, mode="baseline", num_sensory=0)
    torch.testing.assert_close(hmt(ids).logits, expected)


@torch.no_grad()
def test_least_sizes() -> None:
    """Segments of one token, a queue of one memory, a text of one token."""
    model = hmt_model(segment_length=1, num_sensory=0, queue_size=1, summary_fraction=1.0)
    out = model(token_ids(2, 5))
    assert out.logits.isfinite().all() and out.state.num_closed == 5
    one = model(token_ids(2, 5)[:, :1])
    torch.testing.assert_close(one.logits, out.logits[:, :1])
    empty = model.read(token_ids(2, 1)).select_rows(torch.zeros(0, dtype=torch.long))
    assert empty.batch_size == 0 and empty.split() == []


@pytest.mark.parametrize(("name", "learned"), [("gpt2", 512), ("opt", 512)])
def test_more_positions_than_the_backbone_has_learned(name, learned):
    at_most = learned - 2 - 3
    hmt_model(name, segment_length=at_most)
    with pytest.raises(ValueError, match=f"segment_length must be at most {at_most}, got {at_most + 1}"):
        hmt_model(name, segment_length=at_most + 1)


def test_positions_that_are_not_learned_have_no_end():
    hmt_model("llama", segment_length=5000)
