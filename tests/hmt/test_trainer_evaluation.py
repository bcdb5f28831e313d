"""Evaluation in a training and beside it: its loss, its mode, its metrics, its log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import hmt_model
from test_trainer import texts, train, values
from transformers import Trainer, TrainingArguments

from hmt.data import pad_batch
from hmt.training import HMTTrainer, Stage


def test_evaluation_and_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    model, held_back = hmt_model(), texts(48)
    monkeypatch.chdir(tmp_path)
    trainer = train(
        model,
        tmp_path / "out",
        [Stage(2, (2,))],
        eval_documents=held_back,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.0,
        prediction_loss_only=True,
        report_to="tensorboard",
    )
    losses = []
    with torch.no_grad():
        for ids in held_back[0].ids[None].split(32, dim=1):
            losses.append(float(model.eval()(ids, labels=ids).loss) * (ids.shape[1] - 1))
    (found,) = values(trainer, "eval_loss")
    assert values(trainer, "eval_ppl") == [math.exp(found)]
    assert found == pytest.approx(sum(losses) / 46, rel=1e-5)
    assert list((tmp_path / "out" / "runs").rglob("events.out.tfevents.*"))


def test_metrics_see_all_logits(tmp_path: Path) -> None:
    seen = {}

    def right(predictions: Any) -> dict[str, float]:
        seen["logits"], seen["labels"] = map(torch.as_tensor, (predictions.predictions, predictions.label_ids))
        return {"right": float((seen["logits"].argmax(-1)[:, :-1] == seen["labels"][:, 1:]).double().mean())}

    documents = texts(50, 50)
    options = {"eval_documents": documents, "compute_metrics": right, "per_device_eval_batch_size": 1}
    trainer = train(hmt_model(), tmp_path, [Stage(1, (4,))], documents=documents, **options)
    found = trainer.evaluate()
    with torch.no_grad():
        expected = trainer.model(torch.stack([d.ids for d in documents])).logits
    torch.testing.assert_close(seen["logits"], expected, atol=1e-5, rtol=1e-5)
    assert 0 <= found["eval_right"] <= 1 and found["eval_loss"] > 0


def test_a_plain_trainer_evaluates_with_a_loss(tmp_path: Path) -> None:
    model, documents = hmt_model(), texts(40, 40)
    options = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, options, eval_dataset=[d.example() for d in documents], data_collator=pad_batch)
    ids = torch.stack([d.ids for d in documents])
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_loss_of_an_evaluation_is_a_mean_over_tokens(batch_size: int, tmp_path: Path) -> None:
    """Whatever the examples and batches that they come in; the last window holds one prediction."""
    model, held_back = hmt_model(), texts(50)
    options = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=batch_size)
    trainer = HMTTrainer(model, options, texts(50), [Stage(1, (3,))], eval_documents=held_back)
    with torch.no_grad():
        parts = [part[None] for part in held_back[0].ids.split(48)]
        total = sum(float(model(ids, labels=ids, num_items_in_batch=1).loss) for ids in parts)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / 48, rel=1e-5)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(total / 48, rel=1e-5)


def test_an_evaluation_reads_as_the_step_before_it_did(tmp_path: Path) -> None:
    """And outside of a training as the model does."""
    model, seen = hmt_model(), []
    model.register_forward_hook(lambda *_: seen.append((model.training, model.config.mode)))
    options = {"eval_documents": texts(20), "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer = train(model, tmp_path, [Stage(2, (2,), "rmt"), Stage(1, (2,))], prediction_loss_only=True, **options)
    assert [mode for training, mode in seen if training] == ["rmt", "rmt", "hmt"]
    assert [mode for training, mode in seen if not training] == ["rmt", "rmt", "hmt"]
    seen.clear()
    trainer.state.global_step = 0
    trainer.evaluate()
    assert seen == [(False, "hmt")]
