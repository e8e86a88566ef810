"""What the SPIR-V of a kernel says about itself."""

from __future__ import annotations

from functools import cache

import numpy as np

EXECUTION_MODE, SUB_GROUP_SIZE = 16, 35


@cache
def sub_group_size(name: str) -> int | None:
    """The sub-group size that a kernel demands."""
    from ulysses_dp.kernels import constants, manifest  # the package, or what `standin.install` has put in its place

    for opcode, operands in constants.instructions(np.fromfile(manifest.FOLDER / f"{name}.spv", np.uint32)):
        if opcode == EXECUTION_MODE and operands[1] == SUB_GROUP_SIZE:
            return int(operands[2])
    return None


def for_gpu(name: str) -> bool:
    """Whether a kernel is made for GPUs: only these are made of sub-groups."""
    return sub_group_size(name) is not None
