"""What the SPIR-V of a kernel says about itself.

A module is a header of five words and a list of instructions; the first word of each holds its length and its opcode.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from ulysses_dp.kernels import manifest

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
    for opcode, operands in instructions((manifest.FOLDER / f"{name}.spv").read_bytes()):
        if opcode == EXECUTION_MODE and operands[1] == SUB_GROUP_SIZE:
            return operands[2]
    return None


def for_gpu(name: str) -> bool:
    """Whether a kernel is made for GPUs: only these are made of sub-groups."""
    return sub_group_size(name) is not None
