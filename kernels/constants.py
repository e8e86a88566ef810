"""What stands in a SPIR-V module: its specialisation constants, numbers that it leaves open until a driver compiles it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    Words = np.ndarray[tuple[int], np.dtype[np.uint32]]

Constants = tuple[tuple[int, int], ...]  # those that are not 0: (number, value)
HEADER = 5  # words of a module before its instructions
DECORATE, SPEC_ID, SPEC_CONSTANT = 71, 1, 50
EXECUTION_MODE, SUB_GROUP_SIZE, FUNCTION = 16, 35, 54


def instructions(words: Words) -> Iterator[tuple[int, Words]]:
    """Opcode and operands of every instruction of a module; the operands are views."""
    position = HEADER
    while position < len(words):
        length, opcode = divmod(int(words[position]), 1 << 16)
        yield opcode, words[position + 1 : position + length]
        position += length


def specialise(spirv: bytes, constants: Constants) -> bytes:
    """The module with other defaults for some of its constants of 32 bits."""
    words, values = np.frombuffer(spirv, np.uint32).copy(), dict(constants)
    numbers: dict[int, int] = {}  # by the name of the result
    for opcode, operands in instructions(words):
        if opcode == DECORATE and operands[1] == SPEC_ID:
            numbers[int(operands[0])] = int(operands[2])
        elif opcode == SPEC_CONSTANT and numbers.get(int(operands[1])) in values:
            operands[2] = values[numbers[int(operands[1])]]
    return words.tobytes()


def sub_group_size(spirv: bytes) -> int | None:
    """The size of sub-groups that the kernel of a module demands."""
    for opcode, operands in instructions(np.frombuffer(spirv, np.uint32)):
        if opcode == EXECUTION_MODE and operands[1] == SUB_GROUP_SIZE:
            return int(operands[2])
        if opcode == FUNCTION:  # execution modes stand before all functions
            break
    return None
