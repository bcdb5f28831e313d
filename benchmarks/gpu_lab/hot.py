"""The two hot kernels for ncu: a query against a long queue, and a causal segment with rotary embedding.

Each runs twice, first to be compiled; between the profiler's start and its end there is one launch of each.
"""

from __future__ import annotations

import torch

from benchmarks.attention_providers import make_inputs
from hmt_kernels import memory_recall, segment_attention


@torch.no_grad()
def main() -> None:
    memory = torch.randn(1, 8192, 4096, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, 1, 4096, device="cuda", dtype=torch.bfloat16)
    x = make_inputs("rotary", 8, (32, 8), 1058, 128, torch.bfloat16, "cuda")

    def launch() -> None:
        memory_recall(query, memory, softmax_scale=4096**-0.5)
        segment_attention(x.q, x.k, x.v, cos=x.cos, sin=x.sin)
        torch.cuda.synchronize()

    launch()
    torch.cuda.profiler.start()
    launch()
    torch.cuda.profiler.stop()
    print("both kernels are done")


if __name__ == "__main__":
    main()
