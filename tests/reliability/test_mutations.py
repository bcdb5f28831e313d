"""The tests notice faults that are planted one at a time; see tests/mutations.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mutations


def test_every_planted_fault_is_noticed() -> None:
    result = subprocess.run([sys.executable, mutations.__file__], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    count = len(mutations.MUTATIONS)
    assert f"{count} of {count} faults are noticed" in result.stdout


def test_the_text_of_every_fault_is_there_once_at_least() -> None:
    for name, mutation in mutations.MUTATIONS.items():
        text = (Path(mutations.ROOT) / mutation.file).read_text(encoding="utf-8")
        assert mutation.taken_out in text and mutation.taken_out != mutation.replacement, name
