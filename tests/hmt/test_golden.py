"""hmt.compat against runs recorded from HMT-pytorch: logits, loss, recalled ages, gradients and tokens."""

from __future__ import annotations

import golden
import pytest
import torch

from hmt.compat import CrossAttentionMemory

FORWARD = [n for n in golden.names() if n[0] in "abcdefh"]
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
    if case.native_bf16_recall:  # the reference recalled in bfloat16, so that is the precision of its results
        expected = case.outputs["logits"]
        assert (out.logits - expected).norm() < 2**-8 * expected.norm()
        torch.testing.assert_close(out.loss.reshape(1), case.outputs["loss"], atol=0, rtol=2**-8)
        return
    torch.testing.assert_close(out.logits, case.outputs["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.loss.reshape(1), case.outputs["loss"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        torch.as_tensor(out.ret_loss).reshape(1).float(), case.outputs["ret_loss"], atol=1e-5, rtol=0
    )
    assert out.f1 == pytest.approx(case.f1, abs=1e-9)
    parameters = dict(wrapper.named_parameters())
    assert {n for n in case.grad_none if n in parameters and parameters[n].grad is not None} == set()
    assert case.gradients
    for key, expected in case.gradients.items():
        error = (parameters[key].grad - expected).norm() / expected.norm()
        assert error < 1e-4, f"{key}: relative gradient error {error:.1e}"


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


def rule_weights(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """The reproducible weights of the scale case, too large to store: the rule stands in its .json."""
    mask = 0xFFFFFFFF
    h = (torch.arange(shape[0] * shape[1], dtype=torch.int64) * 2654435761 + seed * 40503) & mask
    h = ((h ^ (h >> 15)) * 2246822519) & mask
    h = (h ^ (h >> 13)) & 0xFFFF
    return ((h - 32768).float() / 32768 * 0.03125).view(shape)


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
def test_scale_of_wide_recall(generate: bool) -> None:
    """d, h >= 4096: scores are divided by h in forward and by sqrt(h) in generate."""
    case = golden.load("g_scale_quirk")
    recall = CrossAttentionMemory(4096, 4096)
    recall.load_state_dict({"wq.weight": rule_weights((4096, 4096), 1), "wk.weight": rule_weights((4096, 4096), 2)})
    query, memory = case.inputs["query"], case.inputs["memory"]
    with torch.no_grad():
        output, hist, browse, loss = recall(memory, query, seg_num=memory.shape[1], generate=generate)
    key = f"generate_{int(generate)}"
    torch.testing.assert_close(output, case.outputs[f"output.{key}"], atol=1e-4, rtol=1e-4)
    assert hist == case.outputs[f"hist.{key}"].tolist()
    assert browse == bool(case.outputs[f"browse.{key}"])
    assert loss == 0


def test_scale_of_narrow_recall() -> None:
    case = golden.load("g_scale_quirk")
    recall = CrossAttentionMemory(4096, 64)
    recall.load_state_dict({"wq.weight": rule_weights((64, 4096), 3), "wk.weight": rule_weights((64, 4096), 4)})
    with torch.no_grad():
        output = recall(case.inputs["memory"], case.inputs["query"], seg_num=7)[0]
    torch.testing.assert_close(output, case.outputs["output.dim4096_hid64"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cross_attention_memory(dtype: torch.dtype) -> None:
    """Recall and retrieval loss; the reference's bfloat16 run within bfloat16's precision."""
    case = golden.load("g2_recall_small")
    kind = "fp32" if dtype == torch.float32 else "bf16"
    recall = CrossAttentionMemory(64, 96).to(dtype)
    recall.load_state_dict(case.weights)
    memory, query, pos_mask = (case.inputs[name] for name in ("memory", "query", "pos_mask"))
    output, hist, _, loss = recall(memory, query, seg_num=memory.shape[1], pos_mask=pos_mask)
    expected = case.outputs[f"{kind}.output"]
    assert (output.float() - expected.float()).norm() <= (1e-5 if kind == "fp32" else 2**-7) * expected.float().norm()
    assert hist == case.outputs[f"{kind}.hist"].tolist()
    torch.testing.assert_close(
        loss.float().reshape(1), case.outputs[f"{kind}.loss"].float(), atol=1e-5, rtol=0 if kind == "fp32" else 2**-7
    )
