"""What ``python -m ulysses_dp`` prints: what was found on this machine, and how a call would run."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import dpctl
import dpnp

from ulysses_dp.kernels import manifest

from ._device.queue import default_queue, local_rank
from ._ranks.mpi import choose_route, library_version
from .backends import describe

# When a family of kernels was right on an Intel GPU: the rows of docs/gpu.md whose last column does not say never.
ON_INTEL_GPUS: dict[str, str] = {}


def known_of(device: Any) -> str:
    """What is known of the kernels that a device gets, from where they were run."""
    if not device.is_gpu:
        return "run on CPUs by the tests of every change"
    runs = "; ".join(f"{family}: {when}" for family, when in ON_INTEL_GPUS.items()) or "never"
    return f"run on an Intel GPU: {runs}. docs/gpu.md says what was run where; a --report of --check is welcome"


def report() -> str:
    """What ``python -m ulysses_dp`` prints: devices, the choice of this process, MPI, the exchange, kernels, backends.

    Returns
    -------
    str
        A few lines of text.

    Raises
    ------
    RuntimeError
        SYCL offers no device, or the kernels are not built.

    Examples
    --------
    >>> from ulysses_dp.doctor import report
    >>> print(report().splitlines()[0].split()[0])
    ulysses_dp
    """
    lines = [f"ulysses_dp {importlib.metadata.version('ulysses_dp')} · dpctl {dpctl.__version__} · dpnp {dpnp.__version__}"]
    queue = default_queue()
    for device in dpctl.get_devices():
        chosen = "this process" if device == queue.sycl_device else ""
        backend, kind = device.backend.name, device.device_type.name
        lines.append(f"device   {backend}:{kind} {device.name.strip()} · {device.max_compute_units} units  {chosen}")
    lines.append(f"process  number {local_rank()} on this node")
    lines.append(f"MPI      {library_version()}")
    route = choose_route(queue, "auto")
    lines.append(f"exchange {route.name}: {route.reason}")
    lines.append(f"kernels  {len(manifest.read())} in {manifest.FOLDER}")
    lines.append(f"known    {known_of(queue.sycl_device)}")
    lines.append(f"backends {describe(queue.sycl_device)}")
    return "\n".join(lines)
