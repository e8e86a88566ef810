"""The local attention backends, by name: one module each."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from ._base import Backend
from .intel_onednn import IntelOneDnn
from .intel_sycl import IntelSycl
from .numpy_dense import NumpyDense

if TYPE_CHECKING:
    from .._validate import Geometry

__all__ = ["AttnType", "Backend", "backend_for"]


class AttnType(enum.Enum):
    """Which implementation computes attention on one rank.

    ``INTEL_SYCL`` is the numba-dpex kernel of this package, on any SYCL device. ``INTEL_ONEDNN`` is oneDNN, which uses the
    matrix engines of Intel GPUs; it needs the extra ``onednn``. ``NUMPY`` is the dense float64 reference on
    the host, for comparison: its memory grows with seq_q x seq_k.

    Examples
    --------
    >>> from ulysses_dp import AttnType
    >>> AttnType("numpy")
    <AttnType.NUMPY: 'numpy'>
    """

    INTEL_SYCL = "intel_sycl"
    INTEL_ONEDNN = "intel_onednn"
    NUMPY = "numpy"


_BACKENDS = {
    AttnType.INTEL_SYCL: IntelSycl(),
    AttnType.INTEL_ONEDNN: IntelOneDnn(),
    AttnType.NUMPY: NumpyDense(),
}


def backend_for(attn_type: Any, q: Any, geometry: Geometry) -> Backend:
    """The backend that the user wants for attention of `q`."""
    if not isinstance(attn_type, AttnType):
        raise TypeError(f"attn_type must be a member of AttnType, not {attn_type!r}")
    return _BACKENDS[attn_type]
