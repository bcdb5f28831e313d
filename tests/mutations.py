"""Faults planted one at a time in a copy of the tree: each must make the named test fail. `python tests/mutations.py`

Faults of the CUDA kernels (missing barriers and waits, bounds) are planted by tests/kernels/test_cuda*_sanitizers.py.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
IGNORED = (".git", ".venv", ".cache", ".benchmarks", ".*_cache", "build", "dist", "__pycache__", "*.egg-info", "*.txt")
RECALL, ATTENTION = "hmt_kernels/memory_recall", "hmt_kernels/segment_attention"
ACCURATE = "test_forward_and_backward_are_accurate"


class Mutation(NamedTuple):
    """What is taken out of a file at its first place, what comes in its place, and the test that must notice."""

    file: str
    taken_out: str
    replacement: str
    test: str


MUTATIONS = {
    "future keys are seen": Mutation(
        f"{ATTENTION}/reference.py", "visible = keys <= positions\n", "visible = keys <= positions + 1\n",
        "kernels/test_segment_attention.py::test_a_changed_key_changes_no_earlier_row_and_none_beyond_the_window",
    ),
    "the hole is ignored": Mutation(
        f"{ATTENTION}/triton_forward.py", 's = tl.where(visible, s, float("-inf"))', "s = s",
        "kernels/test_triton_attention.py::test_forward_and_gradients_are_accurate[hole-start]",
    ),
    "the window has one key more": Mutation(
        f"{ATTENTION}/sdpa.py", "(keys > positions - window_size)", "(keys >= positions - window_size)",
        f"kernels/test_segment_attention.py::{ACCURATE}[window-torch.float32-sdpa]",
    ),
    "a row without keys is not zeroed": Mutation(
        f"{ATTENTION}/sdpa.py", "softmax_scale).masked_fill(blind, 0.0)", "softmax_scale)",
        "kernels/test_segment_attention.py::test_rows_without_a_visible_key_are_exactly_zero",
    ),
    "head groups are swapped": Mutation(
        f"{ATTENTION}/reference.py", "(k.shape[1], q.shape[1] // k.shape[1])", "(q.shape[1] // k.shape[1], k.shape[1])",
        f"kernels/test_segment_attention.py::{ACCURATE}[grouped-torch.float32-reference]",
    ),
    "no rescaling of the running sum": Mutation(
        f"{ATTENTION}/triton_forward.py", "add_matmul(acc0 * alpha[:, None], p, v0)", "add_matmul(acc0, p, v0)",
        "kernels/test_triton_attention.py::test_forward_and_gradients_are_accurate[shorter-queries]",
    ),
    "the gradient of lse has the wrong sign": Mutation(
        f"{ATTENTION}/reference.py", "delta = delta - dlse", "delta = delta + dlse",
        f"kernels/test_segment_attention.py::{ACCURATE}[scale-torch.float32-reference]",
    ),
    "recall forgets its scale": Mutation(
        f"{RECALL}/reference.py", "(u @ m.mT) * softmax_scale", "u @ m.mT",
        "kernels/test_memory_recall.py::test_gradient_through_one_output_only[recalled-reference]",
    ),
    "one slot too many is live": Mutation(
        f"{RECALL}/reference.py", "live = slots < num_valid", "live = slots <= num_valid",
        "kernels/test_memory_recall.py::test_dead_slots_are_never_read",
    ),
    "one slot too many is live in Triton": Mutation(
        f"{RECALL}/triton_blocks.py", "tl.load(num_valid_ptr + b), 0)", "tl.load(num_valid_ptr + b) + 1, 0)",
        "kernels/test_triton_recall.py::test_forward_and_gradients_are_accurate[B3-Q2-N7-D576-bfloat16-num_valid-expanded]",
    ),
    "strides are swapped": Mutation(
        f"{RECALL}/triton_plans.py", '"stride_mb": stride(memory, 0),\n        "stride_mn": stride(memory, 1)',
        '"stride_mb": stride(memory, 1),\n        "stride_mn": stride(memory, 0)',
        "kernels/test_triton_recall.py::test_gradient_of_a_sum_alone[1]",
    ),
    "a step writes the next slot": Mutation(
        f"{RECALL}/reference.py", "index = slot_index.clamp(", "index = (slot_index + 1).clamp(",
        "kernels/test_memory_recall_step.py::test_step_works_on_slices[reference]",
    ),
    "a negative scale reaches SDPA": Mutation(
        f"{ATTENTION}/sdpa.py", "softmax_scale < LEAST", "False",
        f"kernels/test_segment_attention.py::{ACCURATE}[scale-negative-torch.float32-sdpa]",
    ),
    "memories go to the next ring slot": Mutation(
        "hmt/state.py", "slot = state.num_closed % queue", "slot = (state.num_closed + 1) % queue",
        "hmt/test_model.py::test_forward_is_the_definition[hmt-llama]",
    ),
    "the padding mask is not moved behind the memory": Mutation(
        "hmt/recurrence.py", "return (mask + left)[:, None, None]", "return mask[:, None, None]",
        "hmt/test_model.py::test_padding_tokens_are_never_seen[llama]",
    ),
    "sensory tokens are one too few": Mutation(
        "hmt/tokens.py", "self.slice(max(0, self.length - count)", "self.slice(max(0, self.length - count + 1)",
        "hmt/test_model.py::test_forward_is_the_definition[rmt-llama]",
    ),
    "changed tensors of a state are taken": Mutation(
        "hmt/state_file.py", "if digest_of(name, tensor) != metadata", "if False and metadata",
        "hmt/test_state.py::test_refused_files[changed]",
    ),
    "files are written in place": Mutation(
        "hmt/state_file.py", 'partial = target.with_name(f".{secrets.token_hex(8)}.partial")\n    try:',
        "partial = target\n    target.unlink(missing_ok=True)\n    try:",
        "hmt/test_state.py::test_a_failed_write_leaves_the_old_file[replace]",
    ),
    "pickled code is loaded": Mutation(
        "hmt/checkpoints.py", "weights_only=True", "weights_only=False",
        "hmt/test_checkpoints.py::test_pickled_code_is_not_run",
    ),
}  # fmt: skip


def run(tree: Path, tests: list[str]) -> int:
    """pytest's exit status in a child of this process, which has imported what takes long; -9 and so on: a crash."""
    child = os.fork()
    if child == 0:
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_noticed(tree: Path, mutation: Mutation) -> bool:
    """Whether the test of a mutation fails with it; the tree is then as it was."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    if mutation.taken_out not in text:
        raise ValueError(f"{mutation.file} no longer holds {mutation.taken_out!r}")
    path.write_text(text.replace(mutation.taken_out, mutation.replacement, 1), encoding="utf-8")
    try:
        status = run(tree, [mutation.test])
    finally:
        path.write_text(text, encoding="utf-8")
    if status in (2, 3, 4, 5):
        raise RuntimeError(f"{mutation.test} did not run:\n{(tree / 'output.txt').read_text()}")
    return status != 0


def main() -> int:
    """Plant every fault and print what noticed it; 1 if any stays unnoticed."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import triton  # noqa: F401

    gc.freeze()  # no child looks for garbage in what is imported
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*IGNORED))
        if run(tree, sorted({mutation.test for mutation in MUTATIONS.values()})) != 0:
            print((tree / "output.txt").read_text())
            print("the tests fail without any fault")
            return 1
        unnoticed = 0
        for name, mutation in MUTATIONS.items():
            noticed = is_noticed(tree, mutation)
            unnoticed += not noticed
            print(f"{'noticed' if noticed else 'NOT NOTICED':12} {name}: {mutation.test}", flush=True)
    gc.unfreeze()
    print(f"{len(MUTATIONS) - unnoticed} of {len(MUTATIONS)} faults are noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
