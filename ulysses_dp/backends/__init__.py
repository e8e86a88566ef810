"""The local attention backends, by name: one module each."""

from __future__ import annotations

import enum
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from ._base import Backend
from .intel_sycl import IntelSycl
from .numpy_dense import NumpyDense
from .torch_sdpa import TorchSdpa
from .user import UserAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._call.checks import Geometry
    from .._call.options import Options
    from .._device.arrays import Array

__all__ = [
    "AttnType",
    "Backend",
    "LocalAttention",
    "UserAttention",
    "backend_for",
    "describe",
    "register_attention",
    "usable",
]


class AttnType(enum.Enum):
    """Which implementation computes attention on one rank.

    ``INTEL_SYCL`` is the numba-dpex kernel of this package, on any SYCL device. ``INTEL_ONEDNN`` is oneDNN's, ``TORCH`` is
    PyTorch's; both are optional and do not have all options. ``NUMPY`` is the dense float64 reference on the host, for
    comparison: its memory grows with seq_q x seq_k. ``AUTO`` takes one of the others by the device, the dtype and the options.
    docs/backends.md compares them.

    Examples
    --------
    >>> from ulysses_dp import AttnType
    >>> AttnType("numpy")
    <AttnType.NUMPY: 'numpy'>
    """

    INTEL_SYCL = "intel_sycl"
    INTEL_ONEDNN = "intel_onednn"
    TORCH = "torch"
    NUMPY = "numpy"
    AUTO = "auto"

    @classmethod
    def from_string(cls, name: str) -> AttnType | UserAttention:
        """The member of this name, in upper or lower case, or what was registered by this name.

        Parameters
        ----------
        name : str
            As in ``"torch"``, or what `register_attention` was given.

        Returns
        -------
        AttnType or UserAttention
            Good as `attn_type`.

        Raises
        ------
        TypeError, ValueError
            There is nothing of this name; the message lists what there is.

        Examples
        --------
        >>> from ulysses_dp import AttnType
        >>> AttnType.from_string("TORCH")
        <AttnType.TORCH: 'torch'>
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {type(name).__name__}")
        members = {member.value: member for member in cls}
        found = _registered.get(name) or members.get(name.lower())
        if found is None:
            raise ValueError(f"name must be one of {', '.join([*members, *_registered])}, not {name!r}")
        return found


LocalAttention = AttnType | UserAttention | Callable[..., Any]  # what users may give as attn_type

_registered: dict[str, UserAttention] = {}


def register_attention(name: str, forward: Callable[..., Any], *, backward: Callable[..., Any] | None = None) -> UserAttention:
    """Make a function of yours a local attention for `attn_type`, under a name.

    Not collective; every rank registers the same. The functions get arrays of the kind, dtype and device that the call was
    given, with all rows and the heads of this rank, and must neither change nor keep them.

    Parameters
    ----------
    name : str
        What messages, other ranks and `AttnType.from_string` call it. A name that is registered again is replaced.
    forward : callable
        ``forward(q, k, v, *, softmax_scale, causal, return_lse, **options)`` returns out, and with `return_lse`
        ``(out, lse)``. q and out are (batch, seq_q, heads, head_dim), k and v (batch, seq_k, kv_heads, head_dim), lse is
        (batch, heads, seq_q) in float32, or in float64 if q is. Other options come as keywords only if the user of attention
        has set them, by the names and with the meanings of `attention`, for the heads of this rank; packed sequences come as
        one batch.
    backward : callable, optional
        ``backward(dout, q, k, v, *, lse, delta, softmax_scale, causal, **options)`` returns ``(dq, dk, dv)``; delta is the sum
        of dout * out over head_dim, minus dlse where that is given, which is all that a gradient needs of out and dlse, of the
        shape and dtype of lse.

    Returns
    -------
    UserAttention
        Good as `attn_type`.

    Raises
    ------
    TypeError, ValueError
        name is no string, empty or that of a member of `AttnType`; or a function cannot be called.

    See Also
    --------
    AttnType : the implementations that are there already.

    Notes
    -----
    A call with options for which a function has no parameters raises NotImplementedError on all ranks before anything is sent,
    and so does a gradient without `backward`. What the functions return is checked. heads is a multiple of kv_heads: where
    the cut between ranks leaves a kv head with fewer query heads than another, k and v come with a head for each of q.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import attention, register_attention
    >>> def mean_of_values(q, k, v, *, softmax_scale, causal, return_lse):
    ...     return np.broadcast_to(v.mean(axis=1, keepdims=True), q.shape)
    >>> mean = register_attention("mean", mean_of_values)
    >>> attention(*np.ones((3, 1, 5, 2, 8)), attn_type=mean).shape
    (1, 5, 2, 8)
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, not {type(name).__name__}")
    if not name or name.lower() in (member.value for member in AttnType):
        raise ValueError(f"name must not be empty or that of a member of AttnType, not {name!r}")
    for argument, function in (("forward", forward), ("backward", backward)):
        if not (callable(function) or (argument == "backward" and function is None)):
            raise TypeError(f"{argument} must be a function, not {type(function).__name__}")
    _registered[name] = UserAttention(name, forward, backward)
    return _registered[name]


def backend_for(attn_type: Any) -> Backend:
    """The backend that the user wants."""
    if isinstance(attn_type, AttnType):
        return _backend_of(attn_type)
    if isinstance(attn_type, UserAttention):
        return attn_type
    if callable(attn_type):
        return UserAttention(getattr(attn_type, "__qualname__", type(attn_type).__qualname__), attn_type)
    raise TypeError(
        "attn_type must be a member of AttnType, a function or what register_attention returned, "
        f"not {attn_type!r}{'; see AttnType.from_string' if isinstance(attn_type, str) else ''}"
    )


@cache
def _backend_of(attn_type: AttnType) -> Backend:
    if attn_type is AttnType.INTEL_ONEDNN:
        from .intel_onednn import IntelOneDnn  # it loads a library that may not be there

        return IntelOneDnn()
    backends = {AttnType.INTEL_SYCL: IntelSycl, AttnType.TORCH: TorchSdpa, AttnType.NUMPY: NumpyDense, AttnType.AUTO: Auto}
    return backends[attn_type]()


# What AUTO takes before INTEL_SYCL, by device and dtype, for attention without options that need more than the causal kernel:
# oneDNN uses the matrix engines of a GPU for 16-bit arrays, which INTEL_SYCL computes in float32, in copies. Not measured:
# there was no GPU. No head_dim makes a difference so far.
PREFERRED = {("gpu", "float16"): AttnType.INTEL_ONEDNN, ("gpu", "bfloat16"): AttnType.INTEL_ONEDNN}


class Auto(Backend):
    """The preferred backend where that is installed and has the options of the call, INTEL_SYCL otherwise."""

    name = "AUTO"

    def for_call(
        self, q: Array, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()
    ) -> Backend:
        preferred = PREFERRED.get((device.device_type.name, geometry.dtype))
        if preferred and options.plain:
            try:
                return backend_for(preferred).for_call(q, device, geometry, options, backward=backward, more=more)
            except (ImportError, NotImplementedError):
                pass
        return backend_for(AttnType.INTEL_SYCL).for_call(q, device, geometry, options, backward=backward, more=more)


_PACKAGES = {AttnType.INTEL_ONEDNN: "onednn", AttnType.TORCH: "torch"}  # the extras have the same names


def version_of(attn_type: AttnType) -> str | None:
    """The version of the package that a backend is, or None where it is not installed."""
    package = _PACKAGES.get(attn_type, "ulysses_dp")
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable() -> list[AttnType]:
    """The backends whose packages are installed."""
    return [x for x in AttnType if x is not AttnType.AUTO and version_of(x)]


def describe(device: Any) -> str:
    """Which backends are installed, and what AUTO takes on a device, in one line."""
    there = usable()
    names = [f"{x.name} {version_of(x)}" if x in _PACKAGES else x.name for x in there]
    preferred = {dtype: x for (kind, dtype), x in PREFERRED.items() if kind == device.device_type.name and x in there}
    takes = "".join(f"{x.name} for plain {dtype}, " for dtype, x in preferred.items())
    return f"{', '.join(names)}; AUTO takes {takes}{AttnType.INTEL_SYCL.name}{' for the rest' if takes else ''}"
