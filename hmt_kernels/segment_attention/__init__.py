"""Causal attention over one segment, with rotary embedding, a hole for padding, a window and grouped heads."""

from hmt_kernels.segment_attention.api import segment_attention

__all__ = ["segment_attention"]
