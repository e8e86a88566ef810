"""Build time: compile every variant of every kernel to SPIR-V and write the manifest beside them.

setup.py calls `main` in the build environment; needs numba-dpex and a SYCL CPU device.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

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
    flash_forward_matrix,
    manifest,
    panel_copy,
    panel_wire,
    row_merge,
    row_merge_gpu,
    row_product,
    row_product_gpu,
    score_walk,
    value_panels,
)
from .numba_shortcuts import take_shortcuts  # noqa: E402

logging.disable(logging.NOTSET)

if TYPE_CHECKING:
    from types import ModuleType

# those that take longest first: they are compiled in this order, and no core waits long for the last one
KERNELS = (
    *(flash_backward_gpu, score_walk, flash_backward, flash_forward_gpu, flash_forward_matrix, flash_forward),
    *(panel_copy, panel_wire, row_merge, row_merge_gpu, row_product, row_product_gpu, value_panels),
)
SCALARS = ("int64", "real")  # all other kinds of parameters are pointers

# numba loads the lowering of range, min, max, … only when it first compiles for the host
cpu_target.target_context.refresh()
take_shortcuts()


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


def _finish(spirv: bytes, kernel_name: str, sub_group: int | None) -> bytes:
    """The SPIR-V module of a kernel of this name, without the names of its values, and with one more execution mode,
    SubgroupSize, where it is given.

    The name that numba gives a kernel is long, and counts what it has compiled. It stands at the entry point and at what this
    calls, which is the kernel itself: if they have two names, Intel's compiler for GPUs makes two functions, and the inner one
    spills. The names of values would be two fifths of a wheel. For the execution mode numba-dpex has no
    name. A module is a header of five words and a list of instructions; the first word of each holds its length and its opcode.
    """
    name, member_name, capability, entry_point, execution_mode, function, decorate = 5, 6, 17, 15, 16, 54, 71
    subgroup_dispatch, subgroup_size, linkage = 58, 35, 41
    words = np.frombuffer(spirv, dtype=np.uint32)
    capabilities, modes, rest, position, numba_name = [], [], [], 5, b""
    while words[position] & 0xFFFF != function:
        length, opcode = words[position] >> 16, words[position] & 0xFFFF
        instruction = words[position : position + length]
        position += length
        if opcode == capability:
            capabilities.append(instruction)
        elif opcode == entry_point:
            numba_name = _name_of(instruction)
            rest.append(_renamed(instruction, kernel_name))
        elif opcode == decorate and instruction[2] == linkage and _name_of(instruction) == numba_name:
            rest.append(_renamed(instruction, kernel_name))
        elif opcode not in (name, member_name):
            rest.append(instruction)
        if opcode == entry_point and sub_group:
            modes.append(np.array([4 << 16 | execution_mode, instruction[2], subgroup_size, sub_group], dtype=np.uint32))
    if sub_group:
        capabilities.append(np.array([2 << 16 | capability, subgroup_dispatch], dtype=np.uint32))
    first_mode = next(i for i, instruction in enumerate(rest) if instruction[0] & 0xFFFF == execution_mode)
    head = [words[:5], *capabilities, *rest[:first_mode], *modes, *rest[first_mode:]]
    return np.concatenate([*head, words[position:]]).tobytes()


def _name_of(instruction: np.ndarray) -> bytes:
    """What an instruction names: bytes up to a zero, in whole words, from the fourth word on."""
    return instruction[3:].tobytes().partition(b"\0")[0]


def _renamed(instruction: np.ndarray, name: str) -> np.ndarray:
    """An instruction with another name."""
    after = 4 + len(_name_of(instruction)) // 4
    text = np.frombuffer(name.encode().ljust(len(name) // 4 * 4 + 4, b"\0"), dtype=np.uint32)
    renamed = np.concatenate([instruction[:3], text, instruction[after:]])
    renamed[0] = len(renamed) << 16 | instruction[0] & 0xFFFF
    return renamed


def compile_variant(module, name, type_names, constants) -> tuple[dict[str, Any], bytes]:
    """The entry of the manifest, and the SPIR-V, of one kernel."""
    device_module = _compile(module.kernel(**constants), module.ARGUMENTS, type_names)
    spirv = _finish(device_module.kernel_bitcode, name, getattr(module, "SUB_GROUP", None))
    entry = {
        "entry": name,
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


def _compile_kernel(number: int) -> tuple[str, dict[str, Any], bytes, set[str]]:
    """Name, entry of the manifest and SPIR-V of the kernel of this number; and the sources that it was made of."""
    gc.disable()  # there is little to collect, and much to look through; the process ends with the kernel
    module, name, type_names, constants = _variants()[number]
    entry, spirv = compile_variant(module, name, type_names, constants)
    print("compiled", name, flush=True)
    return name, entry, spirv, _sources()


def _variants() -> list[tuple[ModuleType, str, dict[str, str], dict[str, Any]]]:
    return [(module, *variant) for module in KERNELS for variant in module.variants()]


def main(folder: Path) -> None:
    """Compile all kernels into a folder."""
    entries, modules, sources = {}, {}, set()
    # Every kernel in a process of its own, on all cores: numba slows down with every function that it has compiled. The
    # processes are forks of one that has imported everything.
    context = get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.compile"])
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, max_tasks_per_child=1) as pool:
        for name, entry, spirv, used in pool.map(_compile_kernel, range(len(_variants()))):
            entries[name], modules[name] = entry, spirv
            sources |= used
    # only now, so that what was there stays until it can be replaced
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    for name, spirv in modules.items():
        (folder / f"{name}.spv").write_bytes(spirv)
    manifest.write(folder, entries, sources)
