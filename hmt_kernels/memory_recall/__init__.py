"""One-pass softmax attention over a queue of memories that are both keys and values."""

from hmt_kernels.memory_recall.api import RecallOutput, memory_recall, memory_recall_step

__all__ = ["RecallOutput", "memory_recall", "memory_recall_step"]
