"""What the SPIR-V of a kernel says about itself."""

from __future__ import annotations

from functools import cache


@cache
def sub_group_size(name: str) -> int | None:
    """The sub-group size that a kernel demands."""
    from ulysses_dp.kernels import constants, manifest  # the package, or what `standin.install` has put in its place

    return constants.sub_group_size((manifest.FOLDER / f"{name}.spv").read_bytes())


def for_gpu(name: str) -> bool:
    """Whether a GPU gets a kernel: only these are made of sub-groups."""
    return sub_group_size(name) is not None


def forms(name: str, *, two_dimensional: bool = True) -> dict[str, tuple[tuple[int, int], ...]]:
    """How a kernel for GPUs may be specialised, of rows that fill its tile, by the name of the form; others have one form.

    Without options; with all but dropout, or all; of rows that block loads cannot read; and what finds peaks for the gradient.
    """
    from ulysses_dp.kernels.flash_forward_gpu import CONSTANTS, OPTIONS

    if "_matrix_" in name:
        return _matrix_forms()
    if not name.startswith(("flash_forward_gpu_", "flash_backward_gpu_")):
        return {"": ()}
    with_dropout = dict.fromkeys(OPTIONS, 1)
    without_dropout = with_dropout | {"dropout": 0}
    blocks = {"two_dimensional": int(two_dimensional and "float32" in name)}
    found = {"": blocks, "options": blocks | without_dropout, "dropout": blocks | with_dropout, "views": {}}
    if "forward" in name:
        found["peaks"] = blocks | without_dropout | {"peaks": 1}
    return {
        form: tuple((CONSTANTS[key], value) for key, value in ({"exact": 1} | values).items() if value)
        for form, values in found.items()
    }


def _matrix_forms() -> dict[str, tuple[tuple[int, int], ...]]:
    """The same of a kernel for matrix engines: bfloat16 without options; float16; all options but dropout, or all."""
    from ulysses_dp.kernels.flash_forward_matrix import CONSTANTS, OPTIONS

    with_dropout = {"changed": 1} | dict.fromkeys(OPTIONS, 1) | {"bias": 2}
    found = {"": {}, "float16": {"half": 1}, "options": with_dropout | {"dropout": 0}, "dropout": with_dropout}
    found["strided bias"] = with_dropout | {"dropout": 0, "bias": 1}
    return {
        form: tuple((CONSTANTS[key], value) for key, value in ({"hardware": 1} | values).items() if value)
        for form, values in found.items()
    }
