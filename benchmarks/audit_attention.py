"""The launches of segment_attention that the audit compiles: every row of its table of configurations, on meta tensors.

All of them with rotary tables, a window and a hole; those of the commonest head dimensions also without any.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.audit_cases import Case
from benchmarks.costs import Cost
from hmt_kernels.segment_attention import triton_plans as plans
from hmt_kernels.segment_attention.triton_configs import decodes
from hmt_kernels.triton_launch import Launch, Target

PLAIN = {"cos": None, "sin": None, "pad_span": None, "window_size": None}
DIRECTIONS = ("forward", "dkdv", "dq", "decode")
# The tiles that spill so much were the fastest on an H100, by 10 % at a batch of 8 (direction, head dimension, arch)
MEASURED_SPILLS = {("dkdv", 128, 90): 32}


def attention_cases(target: Target, every_shape: bool, device: str = "meta") -> Iterator[Case]:
    """float16 has the code of bfloat16 but for the conversions; a head dimension of 80 that of 96 but for the masks."""
    narrow = (32, 80) if every_shape else ()
    for dtype, dims in ((torch.bfloat16, (*narrow, 64, 96, 128, 256)), (torch.float32, (64, 128, 256))):
        for direction in DIRECTIONS:
            for dim in dims:
                if direction == "decode" and not decodes(1, 2, dim, dtype.itemsize):
                    continue  # another kernel takes it
                for settings in ({}, PLAIN) if every_shape or (dim in (64, 128) and dtype == torch.bfloat16) else ({},):
                    large = attention_case(direction, 8, dim, dtype, target, device=device, **settings)
                    small = attention_case(direction, 1, dim, dtype, target, device=device, **settings)
                    yield large
                    if small.label != large.label:
                        yield small
    for dim in (64, 96) if every_shape else (96,):
        for settings in ({}, PLAIN):
            yield attention_case("prepare", 8, dim, torch.bfloat16, target, device=device, **settings)


def attention_case(
    direction: str,
    batch: int,
    dim: int,
    dtype: torch.dtype,
    target: Target,
    length: int = 1058,
    device: str = "meta",
    **settings: object,
) -> Case:
    """The launch of one problem: many heads fill a GPU, or with batch = 1 few that do not."""
    heads = 4 * batch
    q_len = 1 if direction == "decode" else length

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    q, k = (zeros(batch, n, t, dim, dtype=dtype) for n, t in ((2 * heads, q_len), (heads, length)))
    lse = zeros(*q.shape[:3])
    table = zeros(1, length, dim)
    span = zeros(batch, 2, dtype=torch.int32)  # empty: a hole costs a comparison, and hides nothing here
    given = {"cos": table, "sin": table, "pad_span": span, "window_size": length // 2} | settings
    problem = plans.Problem(q, k, k, **given, softmax_scale=0.125, target=target)  # type: ignore[arg-type]
    stats = zeros(2, *lse.shape)
    rotated = (None, None) if problem.cos is None else (k, q)
    launch = {
        "prepare": lambda: plans.plan_prepare(problem, *rotated, (q, lse), (q, lse), stats),
        "forward": lambda: plans.plan_forward(problem, k, q, lse),
        "decode": lambda: plans.plan_decode(problem, q, lse),
        "dkdv": lambda: plans.plan_dkdv(problem, q, k, q, stats, k, k),
        "dq": lambda: plans.plan_dq(problem, q, k, q, stats, q),
    }[direction]()
    plain = " plain" if settings == PLAIN else ""
    label = f"attention {direction} D{dim} {str(dtype).removeprefix('torch.')} {tile_of(launch)}{plain}"
    # lse and its like, which a thread loads for each of its rows where no pipeline brings them.
    short_loads = {"dkdv": 16 if launch.arguments.get("BLOCK_D") else 2, "prepare": 3}.get(direction, 0)
    tensor_cores = direction in ("forward", "dkdv", "dq") and dtype != torch.float32
    scores = batch * 2 * heads * visible_pairs(q_len, length, given["window_size"])
    elements, turn = scores, launch.arguments.get("BLOCK_M", 1) * launch.arguments.get("BLOCK_N", 1)
    if direction == "prepare":
        elements, turn = q.numel() + k.numel(), launch.arguments["ROWS"] * dim
    elif direction == "decode":
        turn = problem.group * launch.arguments["BLOCK_N"]  # the other rows of its tile are empty
    return Case(
        label,
        target,
        launch,
        attention_cost(direction, q, k, scores),
        elements=elements,
        elements_per_turn=turn,
        element_size=dtype.itemsize,
        tensor_cores=tensor_cores,
        short_loads=short_loads,
        hot_spills=MEASURED_SPILLS.get((direction, dim, target.arch), 0) if dtype == torch.bfloat16 else 0,
    )


def visible_pairs(q_len: int, k_len: int, window_size: object) -> int:
    window = window_size if isinstance(window_size, int) else k_len
    return sum(min(position + 1, window) for position in range(k_len - q_len, k_len))


def attention_cost(direction: str, q: torch.Tensor, k: torch.Tensor, scores: int) -> Cost:
    """Products per score, and how often a tensor like q and one like k is read or written."""
    products, of_q, of_k = {
        "forward": (2, 2, 2), "decode": (2, 2, 2), "dkdv": (4, 2, 4), "dq": (3, 3, 2), "prepare": (0, 4, 2)
    }[direction]  # fmt: skip
    nbytes = (of_q * q.numel() + of_k * k.numel()) * q.element_size()
    return Cost(nbytes, 2 * products * scores * q.shape[-1])


def tile_of(launch: Launch) -> str:
    sizes = [launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "STAGES") if name in launch.arguments]
    return "tile " + "x".join(map(str, sizes)) if sizes else "rows"
