"""Training in stages on Trainer: what each step reads, what changes and how fast, and resumption after SIGKILL."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resumable_training
import torch
from backbones import VOCAB, hmt_model
from transformers import Trainer, TrainingArguments

import hmt
from hmt import training
from hmt.adapters import select
from hmt.data import Document, pad_batch
from hmt.model import HMTForCausalLM
from hmt.modes import reading_as
from hmt.training import FixedExamples, HMTTrainer, Stage, StagedExamples, last_checkpoint, plan

HERE = Path(__file__).parent
OWN = ("memory_learning_rate", "decay", "eval_documents", "compute_metrics")  # options of HMTTrainer


def texts(*lengths: int) -> list[Document]:
    return [Document(torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n))) for n in lengths]


def train(model: HMTForCausalLM, directory: Path, stages: list[Stage], **options: Any) -> HMTTrainer:
    """A finished training on three texts; options of HMTTrainer, the others of TrainingArguments."""
    own = {name: options.pop(name) for name in OWN if name in options}
    documents = options.pop("documents", texts(100, 40, 70))
    defaults = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": True}
    trainer = HMTTrainer(model, TrainingArguments(str(directory), **{**defaults, **options}), documents, stages, **own)
    trainer.train()
    return trainer


def values(trainer: HMTTrainer, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_several_gpus_need_a_process_each(tmp_path: Path) -> None:
    """Trainer alone would replicate the model by nn.DataParallel, which cannot work; the batch is that of one GPU."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2)
    arguments._n_gpu = 3
    with pytest.warns(UserWarning, match="the first of 3 GPUs.*torchrun --nproc-per-node 3"):
        trainer = HMTTrainer(hmt_model(), arguments, texts(100), [Stage(2, (2,))])
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == trainer.train_dataset.per_step == 2


def test_a_replica_says_what_to_do_instead() -> None:
    replica = hmt_model()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel cannot replicate an HMT"):
        replica(torch.ones(1, 3, dtype=torch.long))


def test_stages_are_read_as_planned_without_logits(tmp_path: Path) -> None:
    model = hmt_model()
    seen: list[tuple[int, str]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        assert out.logits is None
        seen.append((kwargs["input_ids"].shape[1], model.config.mode))

    model.register_forward_hook(look, with_kwargs=True)
    stages = [Stage(2, (2,), "rmt"), Stage(4, (3, 5))]
    trainer = train(model, tmp_path, stages, documents=texts(500), per_device_train_batch_size=2)
    read_as = [(32, "rmt")] * 2 + [(48, "hmt")] * 2 + [(80, "hmt")] * 2
    assert seen == read_as and model.config.mode == "hmt"
    assert values(trainer, "segments") == [2, 2, 3, 3, 5, 5]
    assert values(trainer, "ppl") == [math.exp(loss) for loss in values(trainer, "loss")]
    assert all(speed > 0 for speed in values(trainer, "tokens_per_second"))
    assert trainer.state.num_input_tokens_seen == 2 * sum(length for length, _ in read_as)


def test_recall_learns_nothing_while_it_is_off(tmp_path: Path) -> None:
    model = hmt_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, tmp_path, [Stage(2, (3,), "rmt")], learning_rate=1e-2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert set(before) - changed == {"summary_prompt", "recall.wq.weight", "recall.wk.weight"}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"decay": 0.25}, [1 / 3, 2 / 3, 1, 0.5]),
        ({"lr_scheduler_type": "linear"}, [0, 0.5, 1, 0.5]),
        ({"lr_scheduler_type": "cosine"}, [0, 0.5, 1, 0.5]),
    ],
    ids=["exponential", "linear", "cosine"],
)
def test_memory_and_backbone_have_their_own_rates(schedule: dict, expected: list[float], tmp_path: Path) -> None:
    model = hmt_model()
    rates: list[tuple[float, ...]] = []
    options = {"learning_rate": 1e-3, "memory_learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, **schedule}
    trainer = HMTTrainer(
        model,
        TrainingArguments(
            str(tmp_path),
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            **{k: v for k, v in options.items() if k not in ("decay", "memory_learning_rate")},
        ),
        texts(60),
        [Stage(4, (2,))],
        memory_learning_rate=1e-2,
        decay=options.get("decay"),
    )
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        names = {n for n, p in model.named_parameters() for q in group["params"] if p is q}
        assert len({name.startswith("backbone.") for name in names}) == 1
        assert group["lr"] == (1e-3 if next(iter(names)).startswith("backbone.") else 1e-2)
    grouped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    step = trainer.optimizer.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        rates.append(tuple(sorted({group["lr"] for group in trainer.optimizer.param_groups})))
        return step(*args, **kwargs)

    trainer.optimizer.step = recorded
    trainer.train()
    for got, factor in zip(rates, expected, strict=True):
        assert got == pytest.approx(sorted({1e-3 * factor, 1e-2 * factor}), rel=1e-6)


def test_accumulation_is_the_larger_batch(tmp_path: Path) -> None:
    """Texts of different lengths, so that their losses weigh differently."""
    results = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = hmt_model()
        trainer = train(
            model,
            tmp_path,
            [Stage(3, (3,))],
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        results.append((values(trainer, "loss"), model.memory.detach()))
        assert all(norm > 0.5 for norm in values(trainer, "grad_norm"))  # clipped in every step
    for losses, memory in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(memory, results[0][1], rtol=1e-4, atol=1e-5)


def test_the_loss_of_the_first_step_is_that_of_its_examples(tmp_path: Path) -> None:
    model = hmt_model()
    documents = texts(90, 33)
    examples = StagedExamples(documents, [2], 16, 3, seed=42)
    total = count = 0.0
    with torch.no_grad():
        for example in (examples[i] for i in range(3)):
            ids, labels = example["input_ids"][None], example["labels"][None]
            total += float(model(ids, labels=labels, num_items_in_batch=1).loss)
            count += int((labels != -100).sum())
    trainer = train(model, tmp_path, [Stage(1, (2,))], documents=documents, per_device_train_batch_size=3)
    assert values(trainer, "loss") == pytest.approx([total / count], rel=1e-5)


def test_every_window_comes_once_per_pass() -> None:
    documents = texts(160, 100, 45)
    segments = [2] * 6 + [3] * 3
    examples = StagedExamples(documents, segments, 16, 2, seed=1)
    assert len(examples) == 18
    first = [tuple(examples[i]["input_ids"].tolist()) for i in range(len(examples))]
    windows_of_two = set(first[:11])
    assert len(windows_of_two) == len(first[:11]) == 11 and first[11] in windows_of_two
    again = StagedExamples(documents, segments, 16, 2, seed=1)
    assert [tuple(again[i]["input_ids"].tolist()) for i in reversed(range(18))] == first[::-1]
    other = StagedExamples(documents, segments, 16, 2, seed=2)
    assert [tuple(other[i]["input_ids"].tolist()) for i in range(18)] != first


def test_bfloat16_computes_low_and_keeps_weights_high(tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        model = hmt_model()
        trainer = train(model, tmp_path, [Stage(3, (2,))], bf16=bf16, learning_rate=1e-3)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses.append(values(trainer, "loss"))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def assert_same_training(resumed: HMTTrainer, whole: HMTTrainer) -> None:
    for name in ("loss", "grad_norm", "learning_rate", "segments", "step", "num_input_tokens_seen"):
        assert values(resumed, name) == values(whole, name), name
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = resumable_training.build(tmp_path / "whole", "full")
    whole.train()
    killed = tmp_path / "killed"
    paths = os.pathsep.join(map(str, [Path(hmt.__file__).parents[1], HERE]))  # the same hmt, installed or not
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    script = [sys.executable, str(HERE / "resumable_training.py"), str(killed), "full"]
    process = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    # as if the next checkpoint had been under way
    (killed / "checkpoint-6").mkdir()
    (killed / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    (killed / "checkpoint-7").mkdir()
    (killed / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": ')
    checkpoint = last_checkpoint(killed)
    assert checkpoint == str(killed / "checkpoint-4")
    resumed = resumable_training.build(killed, "full")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same_training(resumed, whole)


def test_a_lora_training_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(training, "perf_counter", map(float, itertools.count()).__next__)
    whole = resumable_training.build(tmp_path, "lora")
    frozen = {name: p.clone() for name, p in whole.model.named_parameters() if not p.requires_grad}
    whole.train()
    assert all(torch.equal(p, frozen[name]) for name, p in whole.model.named_parameters() if name in frozen)
    factors = [p for name, p in whole.model.named_parameters() if "lora_B" in name]
    assert factors and all(p.abs().max() > 0 for p in factors)
    resumed = resumable_training.build(tmp_path, "lora")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_training(resumed, whole)
    seen = values(whole, "num_input_tokens_seen")
    # one second per step on this clock
    assert values(resumed, "tokens_per_second")[4:] == [b - a for a, b in itertools.pairwise(seen[3:8])]


@pytest.mark.parametrize("step", ["stage without recall", "stage with recall"])
def test_checkpoints_are_of_the_whole_model(step: str, tmp_path: Path) -> None:
    mode = "rmt" if step == "stage without recall" else None
    model = hmt_model()
    train(model, tmp_path, [Stage(1, (2,), mode)], save_strategy="steps", save_steps=1)
    loaded = HMTForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert loaded.config.mode == "hmt"
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_last_checkpoint_of_nothing(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_stages_are_parsed_and_planned() -> None:
    stage = Stage.parse("500:4,8,15")
    assert stage == Stage(500, (4, 8, 15))
    assert Stage.parse("2:3:rmt") == Stage(2, (3,), "rmt")
    assert plan([Stage(2, (1,), "rmt"), Stage(5, (2, 4))]) == [(1, "rmt")] * 2 + [(2, None)] * 3 + [(4, None)] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage.parse("500"), "STEPS:SEGMENTS"),
        (lambda: Stage.parse("500:two"), "STEPS:SEGMENTS"),
        (lambda: Stage.parse("500:2:lstm"), "mode must be one of"),
        (lambda: Stage.parse("0:2"), "steps"),
        (lambda: Stage.parse("2:1,2,3"), "steps"),
        (lambda: Stage.parse("5:0"), "segments"),
        (lambda: HMTTrainer(hmt_model(), TrainingArguments("x", use_cpu=True), texts(50), decay=0.0), "decay"),
        (lambda: HMTTrainer(hmt_model(mode="rmt"), TrainingArguments("x"), texts(50), [Stage(1, (1,), "hmt")]), "mode"),
        (lambda: HMTTrainer(hmt_model(), TrainingArguments("x", use_cpu=True), texts(1)), "at least two tokens"),
        (lambda: select(hmt_model(), "some"), "what must be one of"),
        (lambda: select(hmt_model(mode="baseline"), "memory"), "no memory to train"),
    ],
    ids=["short", "word", "mode", "none", "few", "zero", "decay", "mode-of-less", "empty", "what", "baseline"],
)
def test_mistakes_are_explained(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_hmt_reads_as_what_it_contains() -> None:
    model = hmt_model()
    ids = torch.randint(3, VOCAB, (1, 60))
    with reading_as(model, "rmt"):
        as_rmt = model(ids).logits
    rmt = hmt_model(mode="rmt")
    rmt.memory.data = model.memory.data
    torch.testing.assert_close(as_rmt, rmt(ids).logits)
    with reading_as(model, "baseline"):
        torch.testing.assert_close(model(ids).logits, hmt_model(mode="baseline")(ids).logits)
    assert model.config.mode == "hmt"


def test_smoothed_labels_are_those_of_the_next_token(tmp_path: Path) -> None:
    model, documents = hmt_model(), texts(40)
    options = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    trainer = HMTTrainer(model, options, documents, [Stage(1, (3,))])
    example = pad_batch([documents[0].example()])
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(example))
        logits = model(example["input_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[0], example["labels"][0, 1:], label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_any_seed_orders_the_examples(seed: int) -> None:
    examples = StagedExamples(texts(100), [2] * 4, 16, 1, seed)
    assert {len(examples[i]["input_ids"]) for i in range(4)} == {32, 4}


@pytest.mark.parametrize("make", [lambda d: StagedExamples(d, [2], 16, 1, 0), lambda d: FixedExamples(d, 2, 16)])
def test_an_answer_that_no_example_can_hold_is_found_at_once(make: Any) -> None:
    with pytest.raises(ValueError, match="answer of document 1 must be shorter than an example of 32 tokens, got 80"):
        make([Document(torch.arange(40), 30), Document(torch.arange(90), 10)])


def test_processes_may_lack_gradients_of_recall(tmp_path: Path) -> None:
    """A text of one segment has none, in any stage."""
    for mode, expected in (("hmt", True), ("rmt", True), ("baseline", None)):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        HMTTrainer(hmt_model(mode=mode), arguments, texts(100), [Stage(1, (1,))])
        assert arguments.ddp_find_unused_parameters is expected


def test_a_data_set_of_the_package_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    documents = texts(32, 32, 20)
    examples = [d.example() for d in documents]
    rows = [{name: x.tolist() for name, x in example.items()} for example in examples]
    model, same = hmt_model(), hmt_model()
    trainer = train(model, tmp_path, [Stage(3, (2,))], documents=datasets.Dataset.from_list(rows))
    expected = train(same, tmp_path, [Stage(3, (2,))], documents=examples)
    assert values(trainer, "loss") == values(expected, "loss")


def test_the_speed_is_that_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that evaluations and checkpoints turn on by a minute, and steps by a second."""
    now = [0.0]

    def takes(seconds: float, call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return call(*args, **kwargs)

        return called

    monkeypatch.setattr(training, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "training_step", takes(1.0, Trainer.training_step))
    monkeypatch.setattr(Trainer, "evaluation_loop", takes(60.0, Trainer.evaluation_loop))
    monkeypatch.setattr(Trainer, "_save_checkpoint", takes(60.0, Trainer._save_checkpoint))
    options = {"eval_documents": texts(20), "eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": True}
    options |= {"save_strategy": "steps", "save_steps": 1, "documents": texts(32)}
    options |= {"per_device_train_batch_size": 1}
    trainer = train(hmt_model(), tmp_path, [Stage(4, (2,))], **options)
    assert values(trainer, "tokens_per_second") == [32.0] * 4


def test_a_resumed_training_logs_and_saves_as_often_as_it_is_told(tmp_path: Path) -> None:
    often = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 3}
    train(hmt_model(), tmp_path, [Stage(3, (2,))], **often)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, save_steps=2
    )
    trainer = HMTTrainer(hmt_model(), arguments, texts(100, 40, 70), [Stage(6, (2,))])
    trainer.add_callback(training.NewIntervals())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 4, 5, 6]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_a_batch_size_that_changes_is_refused(tmp_path: Path) -> None:
    """Stages count their examples by it: a training would not come to its later ones."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", auto_find_batch_size=True)
    with pytest.raises(ValueError, match="auto_find_batch_size must be off"):
        HMTTrainer(hmt_model(), arguments, texts(100))


def test_evaluations_before_a_training_are_not_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr(training, "perf_counter", lambda: float(next(now)))
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=1, prediction_loss_only=True, eval_on_start=True,
    )  # fmt: skip
    trainer = HMTTrainer(hmt_model(), arguments, texts(32), [Stage(3, (2,))], eval_documents=texts(20))
    for _ in range(2):
        trainer.evaluate({"a": trainer.eval_dataset, "b": trainer.eval_dataset})
        trainer.train()
    assert values(trainer, "tokens_per_second") == [32.0] * 3
