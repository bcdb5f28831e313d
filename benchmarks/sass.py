"""Reading the machine code of a kernel, as cuobjdump prints it: its loops, its loads, its use of local memory."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    opcode: str  # LDG.E.128
    operands: str


class Code(NamedTuple):
    name: str
    registers: int
    shared_memory: int  # static
    spills: int  # instructions that read or write local memory
    hot_spills: int  # of these, in the streaming loops
    wide_loads: int  # of 16 bytes or in bulk, in the streaming loops
    narrow_loads: int
    tensor_core: int  # instructions of the tensor cores
    loop_length: int  # instructions of the longest innermost loop that streams; of the whole kernel where there is none


_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
_RESOURCES = re.compile(r"^ Function (\S+):\s*\n\s*REG:(\d+) .*?SHARED:(\d+)", re.M)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


def parse(dump: str) -> list[Code]:
    """Every function in the output of `cuobjdump --dump-sass --dump-resource-usage`."""
    resources = {name: (int(registers), int(shared)) for name, registers, shared in _RESOURCES.findall(dump)}
    pieces = _FUNCTION.split(dump)[1:]
    codes = []
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        instructions = [Instruction(int(a, 16), opcode, operands) for a, opcode, operands in _INSTRUCTION.findall(text)]
        spilling = [i for i in instructions if i.opcode.split(".")[0] in ("STL", "LDL")]
        streaming = streaming_loops(instructions)
        hot = sum(any(start <= i.address <= end for start, end in streaming) for i in spilling)
        wide, narrow = streaming_loads(instructions)
        tensor_core = sum(i.opcode.split(".")[0] in ("HMMA", "HGMMA") for i in instructions)
        longest = loop_instructions(instructions)
        codes.append(Code(name, *resources[name], len(spilling), hot, wide, narrow, tensor_core, longest))
    return codes


def streaming_loads(instructions: list[Instruction]) -> tuple[int, int]:
    """Global loads of 16 bytes or more, and of less, in the streaming loops."""
    streaming = streaming_loops(instructions)
    wide = narrow = 0
    for instruction in instructions:
        width = load_width(instruction.opcode)
        if width and any(start <= instruction.address <= end for start, end in streaming):
            wide += width >= 16
            narrow += width < 16
    return wide, narrow


def streaming_loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """The first and last addresses of the loops before the first atomic, or of all before it where there is no loop.

    The first atomic counts the blocks that are done; what follows it reads partial results, not the inputs.
    """
    first_atomic = _first_atomic(instructions)
    found = [(start, end) for start, end in loops(instructions) if end < first_atomic]
    return found or [(0, first_atomic - 1)]


def _first_atomic(instructions: list[Instruction]) -> int:
    atomics = [i.address for i in instructions if i.opcode.split(".")[0] in ("ATOMG", "RED", "REDG")]  # not REDUX
    return min(atomics, default=instructions[-1].address + 1)


def loop_instructions(instructions: list[Instruction]) -> int:
    """Instructions of one turn of the loop that does the work: the longest that loads and holds no other loop."""
    first_atomic = _first_atomic(instructions)
    found = [(start, end) for start, end in loops(instructions) if end < first_atomic]
    innermost = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    bodies = [[i for i in instructions if start <= i.address <= end] for start, end in innermost]
    sizes = [len(body) for body in bodies if any(load_width(i.opcode) for i in body)]
    return max(sizes, default=sum(i.address < first_atomic for i in instructions))


def loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """The first and last address of every loop: a branch that goes back.

    What lies behind the last exit are long waits at barriers, which return to where they came from: no loops.
    """
    found = []
    last_exit = max((i.address for i in instructions if i.opcode.startswith("EXIT")), default=instructions[-1].address)
    for instruction in instructions:
        if instruction.address > last_exit:
            break
        if instruction.opcode.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", instruction.operands)):
            start = int(target[1], 16)
            # A branch to itself follows the end of every function.
            if start < instruction.address:
                found.append((start, instruction.address))
    return found


def load_width(opcode: str) -> int:
    """Bytes per thread of a load from global memory; 0 for another instruction."""
    parts = opcode.split(".")
    if parts[0].startswith(("UBLKCP", "UTMALDG")):
        return 16
    if parts[0] not in ("LDG", "LDGSTS"):
        return 0
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "256": 32}
    return next((sizes[part] for part in parts[1:] if part in sizes), 4)
