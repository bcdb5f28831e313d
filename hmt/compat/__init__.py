"""Drop-in MemoryCell, RecurrentWrapper and CrossAttentionMemory for users of HMT-pytorch.

Same constructors, forward/generate signatures, outputs and state_dict keys; the work is done by `hmt.recurrence`: every
summary that depends on no result in one batch, no logits of summaries, recall on absorbed queries.
"""

from hmt.compat.cell import MemoryCell
from hmt.compat.cross_attention import CrossAttentionMemory
from hmt.compat.wrapper import RecurrentWrapper

__all__ = ["CrossAttentionMemory", "MemoryCell", "RecurrentWrapper"]
