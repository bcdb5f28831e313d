"""What data sheets say of the cards that the kernels are compiled for: ceilings, and limits of a multiprocessor."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.costs import Cost

WARP = 32
REGISTERS = 65536  # of a multiprocessor, a quarter for each of its four schedulers
MOST_WARPS, MOST_BLOCKS = 64, 32
SCHEDULERS = 4


class Card(NamedTuple):
    name: str
    multiprocessors: int
    bandwidth: float  # bytes per second
    rates: dict[int, float]  # operations per second by element size: tensor cores for 2 bytes, the others for 4
    shared_memory: int  # bytes of a multiprocessor
    clock: float  # per second, at which those rates hold


CARDS = {
    80: Card("A100 SXM 80 GB", 108, 2.039e12, {2: 312e12, 4: 19.5e12}, 164 * 1024, 1.41e9),
    90: Card("H100 SXM", 132, 3.35e12, {2: 989e12, 4: 67e12}, 228 * 1024, 1.83e9),
    100: Card("B200", 148, 8.0e12, {2: 2250e12, 4: 75e12}, 228 * 1024, 1.85e9),
}
# of the same architectures, by what PyTorch calls them
OTHERS = {"H200": (90, CARDS[90]._replace(name="H200 SXM", bandwidth=4.8e12))}


def use(device: str) -> None:
    """Take the data sheet of this device, where it is known, for its architecture."""
    for name, (arch, card) in OTHERS.items():
        if name in device:
            CARDS[arch] = card


def blocks_per_multiprocessor(card: Card, warps: int, registers: int, shared_memory: int) -> int:
    """How many blocks of so many warps, registers a thread and bytes of shared memory fit at a time."""
    per_warp = -(-registers // 8) * 8 * WARP
    by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
    by_shared_memory = card.shared_memory // (shared_memory + 1024)  # the system takes 1 KiB of each
    return min(MOST_BLOCKS, MOST_WARPS // warps, by_registers, by_shared_memory)


def predicted(card: Card, cost: Cost, element_size: int, thread_instructions: float) -> tuple[float, str]:
    """Seconds that the highest of three floors allows, and which it is: memory, arithmetic, or issuing instructions."""
    floors = {
        "memory": cost.bytes / card.bandwidth,
        "arithmetic": cost.flops / card.rates[element_size],
        "issue": thread_instructions / (card.multiprocessors * SCHEDULERS * WARP * card.clock),
    }
    bound = max(floors, key=lambda name: floors[name])
    return floors[bound], bound
