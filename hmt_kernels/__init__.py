"""Fused kernels for the Hierarchical Memory Transformer (arXiv 2405.06067).

Two operators, `memory_recall` and `segment_attention`, each with several implementations. `use_impl` and the
environment variable HMT_KERNELS_IMPL choose one by name, `explain` says which one a call would take and why.
"""

from hmt_kernels.dispatch import explain, use_impl
from hmt_kernels.finite import checking
from hmt_kernels.memory_recall import RecallOutput, memory_recall, memory_recall_step
from hmt_kernels.segment_attention import segment_attention

__version__ = "0.1.0"

__all__ = [
    "RecallOutput",
    "__version__",
    "checking",
    "explain",
    "memory_recall",
    "memory_recall_step",
    "segment_attention",
    "use_impl",
]
