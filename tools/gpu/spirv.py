"""What the SPIR-V of a kernel says about itself.

A module is a header of five words and a list of instructions; the first word of each holds its length and its opcode.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

EXECUTION_MODE, SUB_GROUP_SIZE = 16, 35


def instructions(module: bytes) -> Iterator[tuple[int, list[int]]]:
    """The instructions of a module: opcode and operands."""
    words = np.frombuffer(module, dtype=np.uint32).tolist()
    position = 5
    while position < len(words):
        length = words[position] >> 16
        yield words[position] & 0xFFFF, words[position + 1 : position + length]
        position += length


@cache
def sub_group_size(name: str) -> int | None:
    """The sub-group size that a kernel demands."""
    from ulysses_dp.kernels import manifest  # the package, or what `standin.install` has put in its place

    for opcode, operands in instructions((manifest.FOLDER / f"{name}.spv").read_bytes()):
        if opcode == EXECUTION_MODE and operands[1] == SUB_GROUP_SIZE:
            return operands[2]
    return None


def for_gpu(name: str) -> bool:
    """Whether a kernel is made for GPUs: only these are made of sub-groups."""
    return sub_group_size(name) is not None


def specialise(module: bytes, values: dict[int, int]) -> bytes:
    """The module with other defaults of its specialisation constants, by their identifiers."""
    words = np.frombuffer(module, dtype=np.uint32).copy()
    decorate, specialisation_id, constant = 71, 1, 50
    identifiers: dict[int, int] = {}
    position = 5
    while position < len(words):
        length, opcode = int(words[position]) >> 16, int(words[position]) & 0xFFFF
        operands = words[position + 1 : position + length]
        if opcode == decorate and operands[1] == specialisation_id:
            identifiers[int(operands[0])] = int(operands[2])
        if opcode == constant and identifiers.get(int(operands[1])) in values:
            operands[2] = values[identifiers[int(operands[1])]]
        position += length
    return words.tobytes()
