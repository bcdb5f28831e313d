"""hmt.compat against runs recorded from HMT-pytorch: logits, loss, recalled ages, gradients and tokens."""

from __future__ import annotations

import pytest
import torch

import golden
from hmt.compat import CrossAttentionMemory

FORWARD = [n for n in golden.names() if n[0] in "abcdefh" and not n.startswith("a5")]
GENERATE = [n for n in golden.names("i") if "FAILS" not in n and not n.startswith("i8")]


def run(case: golden.Case, wrapper: torch.nn.Module) -> tuple:
    return wrapper(
        case.inputs["input_ids"],
        labels=case.inputs["labels"],
        attention_mask=case.inputs.get("attention_mask"),
        pos_mask=case.inputs.get("pos_mask"),
        segment_size=case.segment_size,
        **case.forward_kwargs,
    )


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    case = golden.load(name)
    wrapper = golden.build_wrapper(case)
    out, hist = run(case, wrapper)
    out.loss.backward()
    assert hist == case.hist
    torch.testing.assert_close(out.logits, case.outputs["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.loss.reshape(1), case.outputs["loss"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.as_tensor(out.ret_loss).reshape(1).float(), case.outputs["ret_loss"], atol=1e-5, rtol=0)
    assert out.f1 == pytest.approx(case.f1, abs=1e-9)
    parameters = dict(wrapper.named_parameters())
    assert {n for n in case.grad_none if n in parameters and parameters[n].grad is not None} == set()
    assert case.gradients
    for key, expected in case.gradients.items():
        error = (parameters[key].grad - expected).norm() / expected.norm()
        assert error < 1e-4, f"{key}: relative gradient error {error:.1e}"


@pytest.mark.parametrize("name", [n for n in golden.names("a5")])
def test_bfloat16_recall(name: str) -> None:
    """HMT-pytorch recalls in bfloat16: eight bits of mantissa is what its result can be compared to."""
    case = golden.load(name)
    out, hist = run(case, golden.build_wrapper(case))
    assert hist == case.hist
    expected = case.outputs["logits"]
    assert (out.logits - expected).norm() < 2**-8 * expected.norm()
    torch.testing.assert_close(out.loss.reshape(1), case.outputs["loss"], atol=0, rtol=2**-8)


@pytest.mark.parametrize("name", GENERATE)
def test_generate(name: str) -> None:
    case = golden.load(name)
    tokens = golden.build_wrapper(case).generate(
        case.inputs["input_ids"],
        case.inputs["attention_mask"],
        case.segment_size,
        mem_seq=case.inputs.get("mem_seq"),
        max_new_tokens=case.max_new_tokens,
        do_sample=case.do_sample,
        eos_token_id=case.eos_token_id,
    )
    assert tokens.tolist() == case.tokens
