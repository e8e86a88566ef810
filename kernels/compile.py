"""Build time: compile every variant of every kernel to SPIR-V and write the manifest beside them.

Run by setup.py in the build environment as ``python -m kernels.compile FOLDER``; needs numba-dpex and a SYCL CPU device.
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numba.core import types
from numba.core.registry import cpu_target

logging.disable(logging.ERROR)  # importing numba-dpex logs a traceback when it finds no GPU to ask for its types
import numba_dpex as dpex  # noqa: E402
from numba_dpex.core.datamodel.models import EmptyStructModel  # noqa: E402
from numba_dpex.core.descriptor import dpex_kernel_target  # noqa: E402
from numba_dpex.core.types import USMNdArray  # noqa: E402
from numba_dpex.core.types.kernel_api.index_space_ids import NdItemType  # noqa: E402

from . import (  # noqa: E402
    flash_backward,
    flash_backward_gpu,
    flash_forward,
    flash_forward_gpu,
    manifest,
    panel_copy,
    row_merge,
    row_product,
    score_walk,
)

logging.disable(logging.NOTSET)

KERNELS = (
    *(flash_forward, flash_forward_gpu, flash_backward, flash_backward_gpu),
    *(panel_copy, row_merge, row_product, score_walk),
)
PARTS = 8
SCALARS = ("int64", "real")  # all other kinds of parameters are pointers

# numba loads the lowering of range, min, max, … only when it first compiles for the host
cpu_target.target_context.refresh()


class _NoArray(USMNdArray):
    """The array argument without which numba-dpex takes no kernel; it has no place in the compiled argument list.

    The real arrays are bare pointers: one argument instead of the five of a numba array, and plain signed indexing.
    """

    def __init__(self):
        super().__init__(1, "C", types.int8, device="opencl:cpu")


dpex_kernel_target.target_context.data_model_manager.register(_NoArray, EmptyStructModel)


def _compile(function, parameters, type_names):
    """The compiled kernel of `function`, whose arguments after the item and the empty array are `parameters`.

    The kinds of the parameters are "int64", "real", groups of these (see arguments.py), and pointers: "table" to int64, any
    other to the type of its name.
    """
    named, expected = tuple(signature(function).parameters)[2:], tuple(name for name, _ in parameters)
    if named != expected:
        raise TypeError(f"kernel {function.__name__} has the parameters {named}, the list of its arguments says {expected}")
    names = {"int64": "int64", "table": "int64", **type_names}
    kinds = {kind: getattr(types, name) for kind, name in names.items()}

    def type_of(kind):
        if isinstance(kind, type):
            return types.NamedTuple([kinds[field] for _, field in _fields(kind)], kind)
        return kinds[kind] if kind in SCALARS else types.CPointer(kinds[kind], addrspace=1)

    dispatcher = dpex.kernel([(NdItemType(1), _NoArray(), *(type_of(kind) for _, kind in parameters))])(function)
    (result,) = dispatcher.overloads.values()
    return result.kernel_device_ir_module


def _fields(group):
    """The names and kinds of the numbers of a group."""
    return [(name, {int: "int64", float: "real"}[kind]) for name, kind in get_type_hints(group).items()]


def _flat(parameters):
    """The arguments of the compiled kernel: (name, kind), with the numbers of a group one by one."""
    for name, kind in parameters:
        if isinstance(kind, type):
            yield from ((f"{name}.{field}", field_kind) for field, field_kind in _fields(kind))
        else:
            yield name, kind


def _finish(spirv: bytes, sub_group: int | None) -> bytes:
    """The SPIR-V module without the names of its values, and with one more execution mode, SubgroupSize, where it is given.

    The names would be two fifths of a wheel; those that drivers read, of the kernel and of what is linked, belong to other
    instructions. For the execution mode numba-dpex has no name. A module is a header of five words and a list of instructions;
    the first word of each holds its length and its opcode.
    """
    name, member_name, capability, entry_point, execution_mode, function = 5, 6, 17, 15, 16, 54
    subgroup_dispatch, subgroup_size = 58, 35
    words = np.frombuffer(spirv, dtype=np.uint32)
    capabilities, modes, rest, position = [], [], [], 5
    while words[position] & 0xFFFF != function:
        length, opcode = words[position] >> 16, words[position] & 0xFFFF
        instruction = words[position : position + length]
        position += length
        if opcode == capability:
            capabilities.append(instruction)
        elif opcode not in (name, member_name):
            rest.append(instruction)
        if opcode == entry_point and sub_group:
            modes.append(np.array([4 << 16 | execution_mode, instruction[2], subgroup_size, sub_group], dtype=np.uint32))
    if sub_group:
        capabilities.append(np.array([2 << 16 | capability, subgroup_dispatch], dtype=np.uint32))
    first_mode = next(i for i, instruction in enumerate(rest) if instruction[0] & 0xFFFF == execution_mode)
    head = [words[:5], *capabilities, *rest[:first_mode], *modes, *rest[first_mode:]]
    return np.concatenate([*head, words[position:]]).tobytes()


def compile_variant(module, name, type_names, constants) -> tuple[dict[str, Any], bytes]:
    """The entry of the manifest, and the SPIR-V, of one kernel."""
    device_module = _compile(module.kernel(**constants), module.ARGUMENTS, type_names)
    spirv = _finish(device_module.kernel_bitcode, getattr(module, "SUB_GROUP", None))
    entry = {
        "entry": device_module.kernel_name,
        "build_options": getattr(module, "BUILD_OPTIONS", {}),
        "arguments": [
            (argument, type_names.get(kind, kind) if kind in SCALARS else "pointer")
            for argument, kind in _flat(module.ARGUMENTS)
        ],
        "constants": {key: x._asdict() if hasattr(x, "_asdict") else x for key, x in constants.items()},
    }
    return entry, spirv


def _sources() -> set[str]:
    """The files of this package that this process has used: what the SPIR-V depends on."""
    used = {name.removeprefix(f"{__package__}.") for name in sys.modules if name.startswith(f"{__package__}.")}
    return {f"{name}.py" for name in (used | {"compile"}) - {"manifest"}}


def _compile_part(part: int) -> tuple[dict[str, dict], dict[str, bytes], set[str]]:
    """Entries of the manifest and SPIR-V of every `PARTS`-th kernel, by name; and the sources they were made of."""
    entries, modules = {}, {}
    variants = [(module, *variant) for module in KERNELS for variant in module.variants()]
    for module, name, type_names, constants in variants[part::PARTS]:
        entries[name], modules[name] = compile_variant(module, name, type_names, constants)
        print("compiled", name, flush=True)
    return entries, modules, _sources()


def main(folder: Path) -> None:
    entries, modules, sources = {}, {}, set()
    # Every part in a process of its own, on all cores: numba slows down with every function that it has compiled. The parts
    # are the same on any machine, because the names of the entry points count the kernels of a process.
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for part_entries, part_modules, part_sources in pool.map(_compile_part, range(PARTS)):
            entries |= part_entries
            modules |= part_modules
            sources |= part_sources
    # only now, so that what was there stays until it can be replaced
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    for name, spirv in modules.items():
        (folder / f"{name}.spv").write_bytes(spirv)
    manifest.write(folder, entries, sources)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
