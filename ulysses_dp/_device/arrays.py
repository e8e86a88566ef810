"""Arrays of any supported kind, to USM and back."""

from __future__ import annotations

import enum
import sys
from functools import lru_cache
from typing import Any

import dpnp
import numpy as np

try:
    import dpnp.tensor as tensor  # since dpnp 0.20
except ImportError:
    import dpctl.tensor as tensor


from .queue import default_queue


class Kind(enum.Enum):
    """What the user's arrays are; the result is of the same kind."""

    DPNP = "dpnp.ndarray"
    USM = "usm_ndarray"
    NUMPY = "numpy.ndarray"
    TORCH = "torch.Tensor"
    STRICT = "array_api_strict.Array"


def _imported(module: str, name: str) -> Any:
    """A class of a module if the program has imported it, or else (), of which nothing is a subclass.

    Before there is an array of a kind, its module has been imported: nothing optional is imported here.
    """
    return getattr(sys.modules.get(module), name, ())


def kind_of(x: Any) -> Kind | None:
    """The kind of an array, or None where it is none that we know."""
    cls: type = type(x)
    return _kind_of_type(cls)


@lru_cache(maxsize=256)
def _kind_of_type(cls: type) -> Kind | None:
    if issubclass(cls, dpnp.ndarray):
        return Kind.DPNP
    if issubclass(cls, tensor.usm_ndarray):
        return Kind.USM
    if issubclass(cls, np.ndarray) and not issubclass(cls, np.ma.MaskedArray):
        return Kind.NUMPY
    if issubclass(cls, _imported("torch", "Tensor")):
        return Kind.TORCH
    if issubclass(cls, _imported("array_api_strict._array_object", "Array")):  # no public name
        return Kind.STRICT
    return None


def obstacle(x: Any, kind: Kind) -> tuple[type[Exception], str] | None:
    """What keeps an array of a known kind from being used: the exception, and what its message says after the name."""
    if kind is not Kind.TORCH:
        return None
    torch = sys.modules["torch"]
    if x.device.type not in ("cpu", "xpu"):
        return TypeError, f"is on the torch device {x.device}; supported are cpu and xpu"
    if x.is_nested or x.layout is not torch.strided:
        return TypeError, f"must be a dense tensor, not {'nested' if x.is_nested else x.layout}"
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # it stands for tensors and has no memory itself
        return TypeError, f"must be a plain torch.Tensor of this rank, not {type(x).__module__}.{type(x).__qualname__}"
    if x.requires_grad and torch.is_grad_enabled():
        return NotImplementedError, "requires a gradient, which is not supported yet; use detach() or torch.no_grad()"
    return None


@lru_cache(maxsize=256, typed=True)  # dtypes of different libraries must not be compared
def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.").removeprefix("array_api_strict.")


def dtype_of(x: Any) -> str:
    """The name of the dtype of an array, the same for all kinds; NumPy's names, which tell the other byte order apart."""
    return _name_of(x.dtype)


def place_of(x: Any, kind: Kind) -> Any:
    """Where an array is, equal for arrays that can be used together: a queue, a device, or None for NumPy."""
    if kind is Kind.DPNP or kind is Kind.USM:
        return x.sycl_queue
    return None if kind is Kind.NUMPY else x.device


def on_host(x: Any, kind: Kind | None) -> bool:
    """Whether the array is in memory of the host, and goes to this rank's device for the call."""
    return kind in (Kind.NUMPY, Kind.STRICT) or (kind is Kind.TORCH and x.device.type == "cpu")


def to_usm(x: Any) -> Any:
    """The array as a `usm_ndarray`: a view, or if it is on the host a copy on this rank's device.

    USM arrays have no bfloat16: the result then holds the bit patterns as uint16.
    """
    kind = kind_of(x)
    if kind is Kind.DPNP:
        return x.get_array()
    if kind is Kind.USM:
        return x
    if on_host(x, kind):
        return tensor.asarray(to_numpy(x, kind), sycl_queue=default_queue())
    # An XPU tensor: the same memory, on the queue that dpctl keeps for its device. This is not the queue of torch, whose work
    # has to be complete first: it may still write this tensor, or read an earlier result whose memory is used again (see
    # `empty_like`). Never run: there was no XPU, only the documentation of DLPack in torch and dpctl.
    x = _readable(x)
    sys.modules["torch"].xpu.current_stream(x.device).synchronize()
    return tensor.from_dlpack(x)


def to_numpy(x: Any, kind: Kind | None) -> np.ndarray:
    """A view of an array on the host, with uint16 for bfloat16."""
    if kind is Kind.TORCH:
        return _readable(x).numpy()
    if kind is Kind.STRICT:  # of its devices, all of which are the host, NumPy may read only this one
        x = np.asarray(x.to_device(x.__array_namespace__().Device("CPU_DEVICE")))
    return x.view(np.uint16) if dtype_of(x) == "bfloat16" else x


def _readable(x: Any) -> Any:
    """A torch tensor as other libraries can read it: without a gradient, with uint16 for bfloat16."""
    x = x.detach().resolve_neg()  # torch negates z.conj().imag only when it reads it
    return x.view(sys.modules["torch"].uint16) if dtype_of(x) == "bfloat16" else x


def from_usm(x: Any, like: Any) -> Any:
    """A result as an array of the kind of `like`, and where that is: a view, or a copy if that is on the host.

    bfloat16 comes as uint16, which no other result is: it gets the dtype of `like`, bfloat16 or uint16.
    """
    kind = kind_of(like)
    if kind is Kind.DPNP:
        return dpnp.asarray(x)
    if kind is Kind.USM:
        return x
    if kind is Kind.TORCH:
        torch = sys.modules["torch"]
        if on_host(like, kind):
            result = torch.from_numpy(tensor.asnumpy(x))
        else:  # never run, see `to_usm`; torch does not wait for the queue on which the result is computed
            x.sycl_queue.wait()
            result = torch.from_dlpack(x)
        return result.view(like.dtype) if x.dtype == np.uint16 else result
    host = tensor.asnumpy(x)
    if kind is Kind.STRICT:
        return like.__array_namespace__().asarray(host, device=like.device)
    return host.view(like.dtype) if x.dtype == np.uint16 else host


def permute(x: Any, axes: tuple[int, ...]) -> Any:
    """A view with the axes in another order. What is no array with these axes comes back as it is, for the checks to name."""
    kind = kind_of(x)
    if axes == (0, 1, 2, 3) or kind is None or obstacle(x, kind) or x.ndim != len(axes):
        return x
    if kind is Kind.USM:
        return tensor.permute_dims(x, axes)
    if kind is Kind.STRICT:
        return x.__array_namespace__().permute_dims(x, axes)
    return x.permute(axes) if kind is Kind.TORCH else x.transpose(axes)


def view(x: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """A view of the whole allocation of a USM array, from an element offset, with any shape and strides."""
    return tensor.usm_ndarray(shape, dtype=x.dtype, buffer=x.usm_data, strides=strides, offset=offset)
