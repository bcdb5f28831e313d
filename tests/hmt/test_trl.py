"""TRL's trainers, which apply the LM head themselves to what `base_model` gives them."""

from __future__ import annotations

import math
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from backbones import VOCAB, hmt_model, token_ids
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hmt import HMTForCausalLM
from hmt.backbone import apply_head

LENGTH = 40  # two segments and a half


def options(folder: Path, **more: Any) -> dict[str, Any]:
    common = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "max_grad_norm": 1e9, **common, **more}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word per token."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2", unk_token="w3")


def texts(count: int, length: int, seed: int) -> list[str]:
    return ["".join(f"w{i} " for i in row) for row in token_ids(count, length, seed).tolist()]


@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-projected"])
def test_the_head_makes_the_logits_of_what_the_body_gives(name: str, mode: str) -> None:
    model, ids = hmt_model(name, mode=mode), token_ids(2, LENGTH)
    mask = torch.ones_like(ids).index_fill(1, torch.arange(5), 0)
    first = model(ids[:, :20], mask[:, :20])
    hidden = model.base_model(ids[:, 20:], mask[:, 20:], state=first.state).last_hidden_state
    expected = model(ids[:, 20:], mask[:, 20:], state=first.state).logits
    torch.testing.assert_close(apply_head(model.backbone, hidden), expected)


def test_the_body_takes_a_text_and_a_state() -> None:
    model, ids = hmt_model(), token_ids(1, LENGTH)
    with pytest.raises(TypeError, match="does not take labels"):
        model.base_model(ids, labels=ids)
    with pytest.raises(TypeError, match="state must be one HMTState, got list"):
        model.base_model(ids, state=[model.new_state()])
    assert copy(model.base_model).config is model.backbone.config


@pytest.mark.parametrize("settings", [{}, {"summary_source": "previous"}], ids=["current", "previous"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_supervised_fine_tuning_has_our_loss_and_gradient(name: str, settings: dict, tmp_path: Path) -> None:
    model, ids = hmt_model(name, **settings), token_ids(2, LENGTH)
    ours = deepcopy(model)
    loss = ours(ids, labels=ids).loss
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in ours.parameters() if p.grad is not None]).norm()
    arguments = trl.SFTConfig(**options(tmp_path), max_length=None, per_device_train_batch_size=2)
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def test_preferences_are_held_against_the_saved_hmt(tmp_path: Path) -> None:
    """The reference model, which TRL loads anew, is an HMT too: before the first step both say the same."""
    hmt_model().save_pretrained(tmp_path)
    model = HMTForCausalLM.from_pretrained(tmp_path)
    data = Dataset.from_dict({"prompt": texts(2, LENGTH, 0), "chosen": texts(2, 9, 1), "rejected": texts(2, 5, 2)})
    arguments = trl.DPOConfig(**options(tmp_path / "out"), max_length=None, per_device_train_batch_size=2)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer())
    assert isinstance(trainer.ref_model, HMTForCausalLM) and trainer.ref_model is not model
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_rewards_train_the_memory(tmp_path: Path) -> None:
    """Prompts of several segments: what earns more by its length changes how earlier segments are recalled."""
    model = hmt_model()
    before = deepcopy(model.recall.state_dict())
    arguments = trl.GRPOConfig(
        **options(tmp_path), per_device_train_batch_size=2, num_generations=2, max_completion_length=20, seed=1
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts(2, LENGTH, 0)}),
        processing_class=tokenizer(),
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["reward_std"] > 0 and math.isfinite(entry["loss"])
    for name, weight in model.recall.state_dict().items():
        assert not torch.equal(weight, before[name]), name
