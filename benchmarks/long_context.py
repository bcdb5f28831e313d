"""A small model in long contexts: its shape, its providers, and the memory of one of them in a process of its own.

python -m benchmarks.long_context PROVIDER CONTEXT [STATE] prints the peak memory of generating, in bytes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks import THREADS, peak_memory
from hmt import HMTForCausalLM, HMTState
from hmt.backbone import apply_head, embed, run_layers

NAME = "6 layers of width 256, L = 256, k = 32, N = 300, B = 1, float32"
SEGMENT_LENGTH = 256
VOCAB_SIZE = 4096
HMT, BACKBONE = "hmt", "backbone alone, its keys cached"
CONTEXTS = (1_000, 10_000, 100_000)
# one segment, so that closing it is counted once
TOKENS = {HMT: SEGMENT_LENGTH, BACKBONE: 8}


def build() -> HMTForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * CONTEXTS[-1],
        tie_word_embeddings=True,
    )
    backbone = AutoModelForCausalLM.from_config(config).eval()
    return HMTForCausalLM.from_backbone(backbone, segment_length=SEGMENT_LENGTH, num_sensory=32, queue_size=300)


def text(tokens: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (1, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def filled_cache(model: HMTForCausalLM, context: int) -> DynamicCache:
    """A cache of the backbone with that many random keys and values; what they are changes neither time nor memory."""
    cache = DynamicCache(config=model.backbone.config)
    for layer in range(6):
        cache.update(torch.randn(1, 4, context, 64), torch.randn(1, 4, context, 64), layer)
    return cache


def generator(model: HMTForCausalLM, provider: str, context: int, state: HMTState | None) -> Callable[[], None]:
    """A call that continues a context by TOKENS[provider] greedy tokens."""

    @torch.no_grad()
    def hmt() -> None:
        token, current = text(1), state
        for _ in range(TOKENS[HMT]):
            out = model(token, state=current, use_cache=True, logits_to_keep=1)
            token, current = out.logits[:, -1:].argmax(-1), out.state

    cache = filled_cache(model, context) if provider == BACKBONE else None

    @torch.no_grad()
    def backbone() -> None:
        token = text(1)
        for _ in range(TOKENS[BACKBONE]):
            hidden = run_layers(model.backbone, embed(model.backbone, token), cache=cache).last_hidden_state
            token = apply_head(model.backbone, hidden).argmax(-1)

    return hmt if provider == HMT else backbone


def peak_in_new_process(provider: str, context: int, state: Path | None = None) -> int:
    """Peak memory in bytes of a process that loads the model, takes the context over and generates."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.long_context",
        provider,
        str(context),
        *([str(state)] if state else []),
    ]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return int(result.stdout.split()[-1])


def main(provider: str, context: str, state: str | None = None) -> None:
    torch.set_num_threads(THREADS)
    call = generator(build(), provider, int(context), HMTState.load(state) if state else None)
    call()
    print(peak_memory.status("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:])
