"""Find the SYCL runtime, and choose the device of this rank; whose turn it is to use it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import sys
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

# The environment variables in which MPI launchers give a process its number within the node. Reading them needs no
# collective call, so that a function that is not collective can choose a device too.
_LOCAL_RANK = (
    "MPI_LOCALRANKID",  # Intel MPI, MPICH (hydra)
    "PALS_LOCAL_RANKID",  # HPE PALS, the launcher of Aurora
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
)
_SELECTOR = "ONEAPI_DEVICE_SELECTOR"
_RUNTIMES = ("OCL_ICD_FILENAMES", "OCL_ICD_VENDORS")
_MASK, _HIERARCHY = "ZE_AFFINITY_MASK", "ZE_FLAT_DEVICE_HIERARCHY"
# what the OpenCL loader of the wheels needs, in the order of their needs
_NEEDED_BY_OPENCL = ("libintlc.so.5", "libirng.so", "libimf.so", "libsvml.so")


def use_cpu_runtime_of_the_wheels() -> None:
    """Make the OpenCL CPU runtime that pip installed visible, unless the user or the system has set one up.

    The OpenCL loader of the wheels does not look where the wheel ``intel-opencl-rt`` puts the runtime, so in a plain virtual
    environment SYCL finds no device at all. Nor does it find the libraries beside itself: without them, SYCL has no OpenCL
    unless something else has loaded them, which the adapter for Level Zero does where ``ONEAPI_DEVICE_SELECTOR`` does not keep
    it out. Takes effect only before the first device is asked for.

    Raises
    ------
    ValueError
        ``ONEAPI_DEVICE_SELECTOR`` is nothing that SYCL can read.
    """
    if os.environ.get(_SELECTOR) == "":
        del os.environ[_SELECTOR]  # empty is as good as not set, but SYCL would end the process
    _check_selector()
    if not sys.platform.startswith("linux"):
        return
    runtime = _cpu_runtime_of_the_wheels()
    if runtime is None:
        return
    for name in _NEEDED_BY_OPENCL:
        if (runtime.parent / name).exists():
            ctypes.CDLL(str(runtime.parent / name))
    vendors = Path("/etc/OpenCL/vendors").glob("*.icd")
    # with both runtimes every CPU would show up as two devices
    of_the_system = any("intelocl" in icd.read_text(errors="ignore") for icd in vendors)
    if not of_the_system and not any(os.environ.get(name) for name in _RUNTIMES):
        os.environ["OCL_ICD_FILENAMES"] = str(runtime)


def _cpu_runtime_of_the_wheels() -> Path | None:
    try:
        files = importlib.metadata.files("intel-opencl-rt") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()).resolve() for file in files if file.name == "libintelocl.so"), None)


def local_rank() -> int:
    """Number of this process within its node, from the MPI launcher's environment; 0 without one."""
    return next((int(os.environ[name]) for name in _LOCAL_RANK if os.environ.get(name, "").isdigit()), 0)


# Held while a thread has work on a device. What dpctl keeps of the order of the work of a queue is not made for two threads,
# its modules can wait for each other for ever where two threads use them for the first time, and so can two threads that wait
# for Intel's CPU runtime. Never held while a thread waits for other ranks.
device_turn = RLock()


def default_queue() -> Any:
    """The queue for arrays that come without one: the device whose number is this process's number within the node.

    Not collective. GPUs are taken before the CPU, and Level Zero before OpenCL. Each tile of a GPU counts, also where Level
    Zero shows a GPU of several tiles as one device. It is dpctl's own cached queue of that device, so that arrays made with
    ``dpnp.asarray(x, device=...)`` share it.

    Returns
    -------
    dpctl.SyclQueue
        The same one in every call.

    Raises
    ------
    RuntimeError
        SYCL offers no GPU and no CPU.

    Examples
    --------
    >>> import dpnp
    >>> from ulysses_dp import default_queue
    >>> x = dpnp.ones((1, 16, 4, 8), sycl_queue=default_queue())  # on the device of this rank
    >>> x.sycl_queue is default_queue()
    True
    """
    with device_turn:
        return _default_queue()


@cache
def _default_queue() -> Any:
    import dpctl

    for kind in ("level_zero:gpu", "opencl:gpu", "cpu"):
        backend, _, device_type = kind.rpartition(":")
        devices = dpctl.get_devices(backend=backend or "all", device_type=device_type)
        parts = [part for device in devices for part in _tiles(device)]
        if parts:
            return dpctl.get_device_cached_queue(parts[local_rank() % len(parts)])
    names = _SELECTOR, *_RUNTIMES, _MASK, _HIERARCHY
    settings = "".join(f"; {name} is {os.environ[name]!r}" for name in names if os.environ.get(name))
    raise RuntimeError(
        f"SYCL offers no GPU and no CPU device{settings}. {_SELECTOR}=opencl:cpu, or no such variable, selects the CPU: "
        "intel-opencl-rt has to be installed, and OCL_ICD_FILENAMES unset or the path of its libintelocl.so. level_zero:gpu "
        f"selects GPUs: of these, {_MASK} may leave none. Where {_HIERARCHY} is FLAT, or not set, every tile has a number of "
        "its own, and 0.1 names nothing. If a device was asked for before ulysses_dp was imported, import ulysses_dp first."
    )


def _tiles(device: Any) -> list[Any]:
    """The parts of a GPU that have memory of their own; a device that cannot be split alone."""
    import dpctl

    if not device.is_gpu:
        return [device]
    try:
        return list(device.create_sub_devices(partition="numa"))
    except dpctl.SyclSubDeviceCreationError:
        return [device]


def _check_selector() -> None:
    """Refuse what would end the process as soon as SYCL reads it, which it does when dpnp is imported."""
    selector = os.environ.get(_SELECTOR, "")
    device = r"(\*|cpu|gpu|\d+(\.(\d+|\*)){0,2}|\*(\.(\d+|\*)){1,2})"
    if selector and not all(re.fullmatch(rf"!?[a-z_*]+:{device}(,{device})*", x, re.IGNORECASE) for x in selector.split(";")):
        raise ValueError(
            f"{_SELECTOR} must be backend:device, as in opencl:cpu or level_zero:gpu, or several with semicolons between them, "
            f"not {selector!r}"
        )
