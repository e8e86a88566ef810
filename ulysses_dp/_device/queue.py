"""Find the SYCL runtime, and choose the device of this rank."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

# The environment variables in which MPI launchers give a process its number within the node. Reading them needs no
# collective call, so that a function that is not collective can choose a device too.
_LOCAL_RANK = (
    "MPI_LOCALRANKID",  # Intel MPI, MPICH (hydra)
    "PALS_LOCAL_RANKID",  # HPE PALS, the launcher of Aurora
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
)


def use_cpu_runtime_of_the_wheels() -> None:
    """Make the OpenCL CPU runtime that pip installed visible, unless the user or the system has set one up.

    The OpenCL loader of the wheels does not look where the wheel ``intel-opencl-rt`` puts the runtime, so in a plain virtual
    environment SYCL finds no device at all. Takes effect only before the first device is asked for.
    """
    if not sys.platform.startswith("linux") or any(x in os.environ for x in ("OCL_ICD_FILENAMES", "OCL_ICD_VENDORS")):
        return
    vendors = Path("/etc/OpenCL/vendors").glob("*.icd")
    if any("intelocl" in icd.read_text(errors="ignore") for icd in vendors):
        return  # with both runtimes every CPU would show up as two devices
    try:
        files = importlib.metadata.files("intel-opencl-rt") or ()
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "libintelocl.so":
            os.environ["OCL_ICD_FILENAMES"] = str(Path(file.locate()).resolve())


def local_rank() -> int:
    """Number of this process within its node, from the MPI launcher's environment; 0 without one."""
    return next((int(os.environ[name]) for name in _LOCAL_RANK if os.environ.get(name, "").isdigit()), 0)


@cache
def default_queue() -> Any:
    """The queue for arrays that come without one: the device whose number is this process's number within the node.

    GPUs are taken before the CPU, and Level Zero before OpenCL. It is dpctl's own cached queue of that device, so that
    arrays made with ``dpnp.asarray(x, device=...)`` share it.

    Returns
    -------
    dpctl.SyclQueue

    Raises
    ------
    RuntimeError
        SYCL offers no GPU and no CPU.
    """
    import dpctl

    for kind in ("level_zero:gpu", "opencl:gpu", "cpu"):
        backend, _, device_type = kind.rpartition(":")
        devices = dpctl.get_devices(backend=backend or "all", device_type=device_type)
        if devices:
            return dpctl.get_device_cached_queue(devices[local_rank() % len(devices)])
    raise RuntimeError(
        "SYCL offers no GPU and no CPU device. If a device was asked for before ulysses_dp was imported, import ulysses_dp "
        "first; otherwise check ONEAPI_DEVICE_SELECTOR and OCL_ICD_FILENAMES, and that intel-opencl-rt or a GPU driver is "
        "installed."
    )
