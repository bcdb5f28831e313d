"""The chunked loss, whose gradient is formed along with it, against the same loss of all logits at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from backbones import VOCAB, backbone
from live_memory import peak_bytes
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hmt.backbone import apply_head
from hmt.loss import SummedCrossEntropy

WIDTH, LENGTHS = 64, (11, 16, 1)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return 3 * d


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    multiplications = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.multiplications += args[0].numel() * args[1].shape[1]
        return function(*args, **(kwargs or {}))


def untied(model: PreTrainedModel) -> None:
    pass


def with_bias(model: PreTrainedModel) -> None:
    model.lm_head = nn.Linear(WIDTH, VOCAB).double()


def with_low_rank(model: PreTrainedModel) -> None:
    """As PEFT puts it in place of a head: only what it adds is trained."""
    down, up = nn.Linear(WIDTH, 3, bias=False).double(), nn.Linear(3, VOCAB, bias=False).double()
    model.lm_head = Sum(model.lm_head.requires_grad_(False), nn.Sequential(down, up))


class Sum(nn.Module):
    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return sum(part(x) for part in self.parts)


def frozen(model: PreTrainedModel) -> None:
    model.lm_head.requires_grad_(False)


def partly_unused(model: PreTrainedModel) -> None:
    model.lm_head.register_parameter("unused", nn.Parameter(torch.ones(2)))


def hooked(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: ScaledGradient.apply(out))


def replaced_forward(model: PreTrainedModel) -> None:
    """As accelerate does it."""
    head = model.lm_head
    head.forward = lambda x: ScaledGradient.apply(nn.Linear.forward(head, x))


def normed(model: PreTrainedModel) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def outside(model: PreTrainedModel) -> None:
    """Its weight is none of its parameters, as in a replica of nn.DataParallel."""
    weight = model.lm_head.weight
    del model.lm_head._parameters["weight"]
    model.lm_head.original = nn.Parameter(weight.detach())
    model.lm_head.weight = model.lm_head.original.clone()


HEADS = [untied, with_bias, frozen, partly_unused, with_low_rank, normed, hooked, replaced_forward, outside]
AT_ONCE = [untied, with_bias, frozen, partly_unused]


def made(head: Callable[[PreTrainedModel], None] = untied, name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(3)
    model = backbone(name).double()
    head(model)
    return model


def segments(requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states [2, T, d] and labels [2, T] of segments of several lengths."""
    generator = torch.Generator().manual_seed(4)
    hidden = [torch.randn(2, n, WIDTH, generator=generator).to(dtype) for n in LENGTHS]
    labels = [torch.randint(VOCAB, (2, n), generator=generator) for n in LENGTHS]
    labels[0][:, ::3] = -100
    return [h.requires_grad_(requires_grad) for h in hidden], labels


def chunked(model: PreTrainedModel, hidden: list[Tensor], labels: list[Tensor], offload: bool = False) -> Tensor:
    loss = SummedCrossEntropy(model, 7, offload=offload)
    for h, y in zip(hidden, labels, strict=True):
        loss.add(h, y)
    return loss.total()


def at_once(model: PreTrainedModel, hidden: list[Tensor], labels: list[Tensor]) -> Tensor:
    logits = apply_head(model, torch.cat(hidden, dim=1)).float()
    return F.cross_entropy(logits.flatten(0, 1), torch.cat(labels, dim=1).flatten(), reduction="sum")


def gradients(
    model: PreTrainedModel, loss_of: Callable[..., Tensor], requires_grad: bool = True
) -> dict[str, Tensor | None]:
    """The loss, divided as a mean is, and its gradients."""
    model.zero_grad()
    dtype = next(model.lm_head.parameters()).dtype
    hidden, labels = segments(requires_grad, dtype)
    loss = loss_of(model, hidden, labels)
    if loss.requires_grad:
        (loss / 17).backward()
    named = {name: p.grad for name, p in model.lm_head.named_parameters()}
    return {"loss": loss.detach(), **named, **{f"hidden {i}": h.grad for i, h in enumerate(hidden)}}


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("requires_grad", [True, False], ids=["trained-below", "head-only"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("head", HEADS)
def test_gradients(head: Callable[[PreTrainedModel], None], offload: bool, requires_grad: bool) -> None:
    model = made(head)
    found = gradients(model, partial(chunked, offload=offload), requires_grad)
    assert_same(found, gradients(model, at_once, requires_grad))


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "granite"])
def test_tied_capped_and_scaled(name: str) -> None:
    model = made(name=name)
    assert_same(gradients(model, chunked), gradients(model, at_once))


def in_float16(model: PreTrainedModel) -> None:
    model.half()


@pytest.mark.parametrize(("head", "products"), [(untied, 3), (frozen, 2), (hooked, 4), (in_float16, 4)])
def test_no_logits_are_computed_twice(head: Callable[[PreTrainedModel], None], products: int) -> None:
    """One product forward, one by the hidden states, one by the weight; the first is repeated for a head with hooks.

    In float16 too: gradients of the logits that are formed before the loss is scaled can be too small for it.
    """
    model = made(head)
    with Products() as counted:
        gradients(model, chunked)
    assert counted.multiplications == products * 2 * sum(LENGTHS) * WIDTH * VOCAB


def test_hooks_of_a_weight_hear_of_its_whole_gradient_once() -> None:
    model = made()
    heard = []
    model.lm_head.weight.register_hook(lambda gradient: heard.append(gradient.clone()))
    found = gradients(model, chunked)
    assert len(heard) == 1
    torch.testing.assert_close(heard[0], found["weight"])


@pytest.mark.parametrize("head", AT_ONCE)
def test_a_graph_that_is_kept_gives_the_same_again(head: Callable[[PreTrainedModel], None]) -> None:
    model = made(head)
    hidden, labels = segments()
    loss = chunked(model, hidden, labels)
    loss.backward(retain_graph=True)
    first = [h.grad.clone() for h in hidden] + [
        p.grad.clone() for p in model.lm_head.parameters() if p.grad is not None
    ]
    (2 * loss).backward()
    second = [h.grad for h in hidden] + [p.grad for p in model.lm_head.parameters() if p.grad is not None]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_a_second_derivative_is_refused() -> None:
    hidden, labels = segments()
    loss = chunked(made(), hidden, labels)
    with pytest.raises(RuntimeError, match="leave create_graph out"):
        torch.autograd.grad(loss, hidden[0], create_graph=True)


def test_under_hooks_of_all_modules() -> None:
    """PyTorch's own counter of operations cannot follow a gradient that is formed in a forward pass."""
    model = made()
    with FlopCounterMode(display=False):
        found = gradients(model, chunked)
    assert_same(found, gradients(model, at_once))


def test_inside_a_checkpoint_of_the_callers() -> None:
    model = made()
    inside = partial(checkpoint, chunked, use_reentrant=False)
    assert_same(gradients(model, inside), gradients(model, at_once))


def test_what_the_caller_does_with_saved_tensors_never_meets_logits() -> None:
    """Such as moving them to another place."""
    model = made()
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(model, chunked)
    assert torch.Size([2 * LENGTHS[0], WIDTH]) in shapes
    assert torch.Size([7, VOCAB]) not in shapes


def test_the_gradient_of_the_head_is_kept_once_for_all_segments() -> None:
    """Beside that and the chunk at hand, a segment leaves nothing but the gradient of its hidden states."""
    model = made().float()

    def train(count: int) -> None:
        model.zero_grad()
        hidden = [torch.zeros(1, 4, WIDTH, requires_grad=True) for _ in range(count)]
        chunked(model, hidden, [torch.zeros(1, 4, dtype=torch.long)] * count).backward()

    train(1)
    few, many = (peak_bytes(partial(train, count)) for count in (2, 12))
    # two gradients of the head on the way to .grad, but not two per segment
    assert many - few <= 10 * 4 * (4 * 4 * WIDTH + 256)
    assert few >= VOCAB * WIDTH * 4


def test_threads_leave_the_head_as_it_is() -> None:
    model = made().float()
    weight, found = model.lm_head.weight, []

    def work() -> None:
        hidden = [torch.randn(1, 64, WIDTH)]
        for _ in range(30):
            found.append(chunked(model, hidden, [torch.zeros(1, 64, dtype=torch.long)]).requires_grad)
            found.append(model.lm_head.weight is weight)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.lm_head.weight is weight and found == [True] * 180


def test_many_chunks_in_bfloat16_are_added_up_in_float32() -> None:
    model = made().bfloat16()
    hidden = [torch.randn(1, 7 * 200, WIDTH).bfloat16()]
    labels = [torch.randint(VOCAB, (1, 7 * 200))]
    gradients = []
    for loss_of, dtype in ((chunked, torch.bfloat16), (at_once, torch.bfloat16), (at_once, torch.float64)):
        loss = loss_of(model.to(dtype), [h.to(dtype) for h in hidden], labels)
        gradients += torch.autograd.grad(loss, model.lm_head.weight)
    in_chunks, plain, exact = gradients
    assert (in_chunks - exact).norm() <= 2 * (plain - exact).norm()


def test_a_loss_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing has been added"):
        SummedCrossEntropy(made(), 8).total()
