"""Two processes over gloo give the loss and the gradients of one: accelerate's DDP, and FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import two_processes
from safetensors.torch import load_file

pytest.importorskip("accelerate")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error <= 1e-6, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their results."""
    folder = tmp_path_factory.mktemp("distributed")
    two_processes.run("distributed_processes.py", folder)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one(kind: str, folder: Path) -> None:
    import distributed_step

    model = distributed_step.build()
    expected = distributed_step.results(model, distributed_step.step(model))
    found = load_file(folder / f"step-{kind}.safetensors")
    assert_same(found, expected)
    assert not torch.equal(found["memory"], torch.zeros_like(found["memory"]))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_training_in_two_processes_is_one(kind: str, folder: Path, tmp_path: Path) -> None:
    """Stages, accumulation, texts of different lengths: the same losses and gradients as with the batch in one."""
    import distributed_training

    found, expected = load_file(folder / f"training-{kind}.safetensors"), distributed_training.train(tmp_path, 4)
    assert_same(found, expected)
