"""Run time: load the compiled kernels and launch them on a queue through dpctl."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from dpctl import SyclQueue
from dpctl.program import create_program_from_spirv

from . import manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

_SCALARS = {"int64": ctypes.c_int64, "float32": ctypes.c_float, "float64": ctypes.c_double}


@cache
def _kernel(context: Any, device: Any, name: str) -> Any:
    """The kernel, compiled by the driver for this context and device on first use."""
    entry = manifest.read()[name]
    spirv = (manifest.FOLDER / f"{name}.spv").read_bytes()
    options = entry["build_options"].get(device.backend.name, "") if device.is_gpu else ""
    # a program is built through a queue, but belongs to its context and device alone
    program = create_program_from_spirv(SyclQueue(context, device), spirv, options)
    kernel = program.get_sycl_kernel(entry["entry"])
    expected = len(entry["arguments"])
    if kernel.num_args != expected:
        raise RuntimeError(f"kernel {name} takes {kernel.num_args} arguments, its manifest lists {expected}")
    return kernel


@lru_cache(maxsize=1024)
def _flatten(name: str, scalars: tuple[float, ...]) -> list[Any]:
    """The scalar arguments as ctypes values: they are the last ones of the kernel's argument list."""
    kinds = [kind for _, kind in manifest.read()[name]["arguments"][-len(scalars) :]]
    return [_SCALARS[kind](value) for kind, value in zip(kinds, scalars, strict=True)]


def place(x: Any) -> tuple[int, ...]:
    """Where a USM array lies in its allocation: offset and strides, in elements."""
    return x._element_offset, *x.strides


def launch(queue: Any, name: str, memories: Sequence[Any], scalars: tuple[float, ...], *, groups: int, lanes: int) -> None:
    """Run kernel `name` over `groups` work-groups of `lanes` work-items, after all earlier work of the queue, and wait for it.

    Queues are out of order, and what was submitted before may be dpnp's or the user's own: so the queue is waited for first.
    Waiting afterwards keeps the arguments alive for as long as the kernel needs them.

    Parameters
    ----------
    queue : dpctl.SyclQueue
        Where to run.
    name : str
        A kernel of the manifest.
    memories : sequence of dpctl.memory objects
        The pointer arguments, first in the kernel's argument list.
    scalars : tuple of int or float
        All the other arguments, in order.
    groups, lanes : int
        The one-dimensional index space.
    """
    if lanes > queue.sycl_device.max_work_group_size:
        # dpctl can return normally from such a launch, with the output untouched
        raise RuntimeError(f"kernel {name} needs work-groups of {lanes}, {queue.sycl_device.name} allows fewer")
    kernel = _kernel(queue.sycl_context, queue.sycl_device, name)
    arguments = [*memories, *_flatten(name, scalars)]
    queue.wait()
    queue.submit_async(kernel, arguments, [groups * lanes], [lanes]).wait()
