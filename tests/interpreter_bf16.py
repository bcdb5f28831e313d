"""Makes Triton's interpreter right for bfloat16, and faster; call `install()` before a kernel runs.

The interpreter (triton 3.6 to 3.9) keeps bfloat16 as its bits in a uint16, but computes with those integers: arithmetic
and tl.dot are silently wrong, and float32 is cut off rather than rounded. Here every operation on bfloat16 is done
in float32 and rounded to nearest even, as on a GPU.

It also spends most of its time on what no result depends on: it patches triton.language again at every call of a device
function (here for every launch only), makes its table of dtypes at every look into it, and repeats sums and products of
integers in 64 bits to notice an overflow.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def to_float32(handle: TensorHandle) -> TensorHandle:
    """The same value as float32, if it is bfloat16."""
    if not is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def to_bf16(values: np.ndarray) -> TensorHandle:
    """Round to the nearest bfloat16, to the even one when two are equally near."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # The addition above would turn some NaNs into infinities.
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


@functools.cache
def install() -> None:
    binary_op, unary_op = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    cast_impl, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    create_fma, patch_tensor = InterpreterBuilder.create_fma, interpreter._patch_lang_tensor
    patch_lang, get_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    np_dtypes: dict[str, np.dtype] = {}

    def np_dtype_of(dtype):
        if (name := dtype.scalar.name) not in np_dtypes:
            np_dtypes[name] = get_np_dtype(dtype.scalar)
        return np_dtypes[name]

    def patch_lang_for_launch(kernel):
        # Triton's own functions see tl.core where kernels see tl.
        scopes = [patch_lang(kernel), patch_lang(tl.zeros.fn)]
        return SimpleNamespace(restore=lambda: [scope.restore() for scope in reversed(scopes)])

    def call_function(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    def binary_op_bf16(self, lhs, rhs, op):
        result = binary_op(self, to_float32(lhs), to_float32(rhs), op)
        is_comparison = result.data.dtype == np.bool_
        return to_bf16(result.data) if is_bf16(lhs) and not is_comparison else result

    def unary_op_bf16(self, arg, op):
        result = unary_op(self, to_float32(arg), op)
        return to_bf16(result.data) if is_bf16(arg) else result

    def create_fma_bf16(self, x, y, z):
        result = create_fma(self, to_float32(x), to_float32(y), to_float32(z))
        return to_bf16(result.data) if is_bf16(z) else result

    def create_dot_bf16(self, a, b, acc, *options):
        result = create_dot(self, to_float32(a), to_float32(b), to_float32(acc), *options)
        return to_bf16(result.data) if is_bf16(acc) else result

    def cast_impl_bf16(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if is_bf16(src) else to_bf16(src.data)
        return cast_impl(self, to_float32(src), dst_type)

    def patch_tensor_index(tensor, scope):
        patch_tensor(tensor, scope)
        # triton 3.6 takes int() of an array with one element, which numpy no longer allows.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary_op_bf16, unary_op_bf16
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl_bf16, create_dot_bf16
    InterpreterBuilder.create_fma, interpreter._patch_lang_tensor = create_fma_bf16, patch_tensor_index
    InterpretedFunction.__call__, interpreter._patch_lang = call_function, patch_lang_for_launch
    interpreter._get_np_dtype = np_dtype_of
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
