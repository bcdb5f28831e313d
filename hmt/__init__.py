"""The thin model layer: any Hugging Face causal language model as a Hierarchical Memory Transformer."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hmt import attention
from hmt.config import HMTConfig
from hmt.model import HMTForCausalLM, HMTOutput
from hmt.recall import MemoryRecall
from hmt.rotary import fuse_rotary, unfuse_rotary
from hmt.state import HMTState
from hmt_kernels import checking

__all__ = [
    "HMTConfig",
    "HMTForCausalLM",
    "HMTOutput",
    "HMTState",
    "MemoryRecall",
    "checking",
    "fuse_rotary",
    "unfuse_rotary",
]

attention.register()
AutoConfig.register("hmt", HMTConfig, exist_ok=True)
AutoModelForCausalLM.register(HMTConfig, HMTForCausalLM, exist_ok=True)
# by this list of names Trainer knows whose labels its label smoothing has to shift
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hmt"] = HMTForCausalLM.__name__
