"""Bytes and floating point operations that a task needs at least, by formula: the same for every provider of it.

A provider that projects keys again or writes scores to memory does more; that is what its share of the roofline shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Cost(NamedTuple):
    bytes: float
    flops: float

    def times(self, factor: float) -> Cost:
        return Cost(self.bytes * factor, self.flops * factor)

    def plus(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


class Ceilings(NamedTuple):
    bandwidth: float  # bytes per second
    rate: float  # operations per second


def share(cost: Cost, seconds: float, of: Ceilings) -> float:
    """The time that the slower of the two ceilings allows over the time taken.

    Above 1 where the bytes lie in a cache: the bandwidth is that of the memory behind it.
    """
    return max(cost.bytes / of.bandwidth, cost.flops / of.rate) / seconds


def recall(slots: int, dim: int, element_size: int) -> Cost:
    """One absorbed query against [N, D]: the queue is read once, the query read, the result written; two products."""
    return Cost((slots + 2) * dim * element_size, 4 * slots * dim)


def attention(
    metric: str, batch: int, heads: tuple[int, int], length: int, dim: int, element_size: int, hidden: tuple[int, int]
) -> Cost:
    """Causal attention with hidden keys [start, stop): "forward" two products, "backward" five, "both" seven.

    Forward reads q, k, v and writes o; backward reads these and do, and writes dq, dk, dv.
    """
    start, stop = hidden
    pairs = length * (length + 1) // 2 - sum(length - 1 - key for key in range(start, stop))
    products, of_q, of_kv = {"forward": (2, 2, 2), "backward": (5, 4, 4), "both": (7, 6, 6)}[metric]
    rows = of_q * heads[0] + of_kv * heads[1]
    return Cost(batch * rows * length * dim * element_size, 2 * products * batch * heads[0] * pairs * dim)


def layers(config: PreTrainedConfig, tokens: int, cached: int = 0) -> float:
    """Operations of all layers of a Llama for `tokens` new tokens behind `cached` others, causal."""
    width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    kv_width = config.num_key_value_heads * head_dim
    weights = width * (2 * width + 2 * kv_width) + 3 * width * config.intermediate_size
    pairs = tokens * cached + tokens * (tokens + 1) // 2
    return config.num_hidden_layers * (2 * tokens * weights + 4 * pairs * width)


def model(workload: str, config: PreTrainedConfig, segments: int, length: int, num_sensory: int, weights: int) -> Cost:
    """ "read": a summary pass and a main pass per segment; "score": and the LM head; "train": three times that.

    Bytes are those of the weights, `weights` in all, once per main pass, which wait for one another, and once for all
    summaries. What an activation checkpoint computes again does not count.
    """
    summary, main = length // 2 + 2, length + 2
    flops = (
        segments * layers(config, summary) + layers(config, main) + (segments - 1) * layers(config, main + num_sensory)
    )
    if workload != "read":
        flops += 2.0 * segments * length * config.hidden_size * config.vocab_size
    return Cost(weights * (segments + 1), flops).times(3 if workload == "train" else 1)


def decode(config: PreTrainedConfig, context: int, weights: int, element_size: int) -> Cost:
    """One token behind `context` keys that are kept: the weights and the keys are read once."""
    kv_width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * context * kv_width * element_size
    return Cost(weights + kept, layers(config, 1, context) + 2 * config.hidden_size * config.vocab_size)
