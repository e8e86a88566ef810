"""Arrays of every supported library, to USM and back: a class for each library."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import dpnp
import numpy as np
from dpctl.memory import MemoryUSMDevice, as_usm_memory

try:
    import dpnp.tensor as tensor  # since dpnp 0.20
except ImportError:
    import dpctl.tensor as tensor

from .dtypes import BITS
from .queue import default_queue, device_turn

if TYPE_CHECKING:
    from collections.abc import Sequence


# dpnp's own way to wrap a usm_ndarray, which is not public: `asarray` makes the same of it in 20 µs instead of 0.2
_to_dpnp = getattr(dpnp.ndarray, "_create_from_usm_ndarray", dpnp.asarray)


class Library:
    """What there is to know of the arrays of one library: a new one is a subclass of this in `LIBRARIES`."""

    name: str  #: of its class of arrays, for messages
    device_is = "device"  #: what `device` tells

    def owns(self, cls: type) -> bool:
        """Whether these are its arrays."""
        raise NotImplementedError

    def obstacle(self, x: Any) -> tuple[type[Exception], str] | None:
        """What keeps an array from being used: the exception, and what its message says after the name."""
        return None

    def describe(self, x: Any) -> Array:
        """What an array of this library is."""
        return Array(x, self, dtype_of(x), tuple(x.shape), self.device(x), self.on_host(x))

    def device(self, x: Any) -> Any:
        """Where an array is, equal for arrays that can be used together: a queue, a device, or None."""
        raise NotImplementedError

    def on_host(self, x: Any) -> bool:
        """Whether an array is in memory of the host, and goes to the device of this rank for the call."""
        raise NotImplementedError

    def to_usm(self, x: Any) -> Any:
        """An array as a `usm_ndarray`, with `BITS` for dtypes that SYCL does not have; a copy if it is on the host."""
        return from_host(self.to_numpy(x), default_queue())

    def to_numpy(self, x: Any) -> np.ndarray:
        """A view of an array on the host, with `BITS` for dtypes that NumPy does not have."""
        raise NotImplementedError

    def from_usm(self, x: Any, like: Any) -> Any:
        """A result as an array of this library, where `like` is; what holds the `BITS` of its dtype gets that dtype."""
        raise NotImplementedError


class _Usm(Library):
    name = "usm_ndarray"
    device_is = "queue"

    def owns(self, cls: type) -> bool:
        return issubclass(cls, tensor.usm_ndarray)

    def describe(self, x: Any) -> Array:
        usm = self.to_usm(x)  # asked for each of these, a dpnp.ndarray takes twice the time
        return Array(x, self, _name_of(usm.dtype), usm.shape, usm.sycl_queue, False)

    def device(self, x: Any) -> Any:
        return x.sycl_queue

    def on_host(self, x: Any) -> bool:
        return False

    def to_usm(self, x: Any) -> Any:
        return x

    def from_usm(self, x: Any, like: Any) -> Any:
        return x


class _Dpnp(_Usm):
    name = "dpnp.ndarray"

    def owns(self, cls: type) -> bool:
        return issubclass(cls, dpnp.ndarray)

    def to_usm(self, x: Any) -> Any:
        return x.get_array()

    def from_usm(self, x: Any, like: Any) -> Any:
        return _to_dpnp(x)


class _Numpy(Library):
    name = "numpy.ndarray"

    def owns(self, cls: type) -> bool:
        # a mask would be lost, and a matrix has two axes whatever is done to it
        return issubclass(cls, np.ndarray) and not issubclass(cls, np.ma.MaskedArray | np.matrix)

    def device(self, x: Any) -> Any:
        return None

    def on_host(self, x: Any) -> bool:
        return True

    def to_numpy(self, x: Any) -> np.ndarray:
        bits = BITS.get(dtype_of(x))
        return np.asarray(x.view(bits) if bits else x)

    def from_usm(self, x: Any, like: Any) -> Any:
        host = to_host(x)
        return host.view(like.dtype) if _holds_bits(x, like) else host


class _Torch(Library):
    name = "torch.Tensor"

    def owns(self, cls: type) -> bool:
        return issubclass(cls, _imported("torch", "Tensor"))

    def obstacle(self, x: Any) -> tuple[type[Exception], str] | None:
        torch = sys.modules["torch"]
        if x.device.type not in ("cpu", "xpu"):
            return TypeError, f"is on the torch device {x.device}; supported are cpu and xpu"
        if x.is_nested or x.layout is not torch.strided:
            return TypeError, f"must be a dense tensor, not {'nested' if x.is_nested else x.layout}"
        if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # it stands for tensors and has no memory itself
            return TypeError, f"must be a plain torch.Tensor of this rank, not {type(x).__module__}.{type(x).__qualname__}"
        if x.requires_grad and torch.is_grad_enabled():
            return (
                NotImplementedError,
                "requires a gradient; use ulysses_dp.torch where it has one, or detach() or torch.no_grad()",
            )
        return None

    def device(self, x: Any) -> Any:
        return x.device

    def on_host(self, x: Any) -> bool:
        return x.device.type == "cpu"

    def to_usm(self, x: Any) -> Any:
        if self.on_host(x):
            return super().to_usm(x)
        # DLPack gives memory on the queue that dpctl keeps for the device, which knows nothing of that of torch, whose work
        # has to be complete first: it may still write this tensor, or read an earlier result whose memory is used again (see
        # `empty_like`). Never run: there was no XPU, only the documentation of DLPack in torch and dpctl.
        x = self._readable(x)
        sys.modules["torch"].xpu.current_stream(x.device).synchronize()
        return tensor.from_dlpack(x)

    def to_numpy(self, x: Any) -> np.ndarray:
        return self._readable(x).numpy()

    def from_usm(self, x: Any, like: Any) -> Any:
        torch = sys.modules["torch"]
        if self.on_host(like):
            result = torch.from_numpy(to_host(x))
        else:  # never run, see `to_usm`; torch does not wait for the queue on which the result is computed
            x.sycl_queue.wait()
            result = torch.from_dlpack(x)
        return result.view(like.dtype) if _holds_bits(x, like) else result

    @staticmethod
    def _readable(x: Any) -> Any:
        """A tensor as other libraries can read it: without a gradient, with `BITS` for dtypes that they do not have."""
        x = x.detach().resolve_neg()  # torch negates z.conj().imag only when it reads it
        bits = BITS.get(dtype_of(x))
        return x.view(getattr(sys.modules["torch"], bits)) if bits else x


class _Strict(Library):
    name = "array_api_strict.Array"

    def owns(self, cls: type) -> bool:
        return issubclass(cls, _imported("array_api_strict._array_object", "Array"))  # no public name

    def device(self, x: Any) -> Any:
        return x.device

    def on_host(self, x: Any) -> bool:
        return True

    def to_numpy(self, x: Any) -> np.ndarray:
        # of its devices, all of which are the host, NumPy may read only this one
        return np.asarray(x.to_device(x.__array_namespace__().Device("CPU_DEVICE")))

    def from_usm(self, x: Any, like: Any) -> Any:
        return like.__array_namespace__().asarray(to_host(x), device=like.device)


LIBRARIES: tuple[Library, ...] = (_Dpnp(), _Usm(), _Numpy(), _Torch(), _Strict())


def _imported(module: str, name: str) -> Any:
    """A class of a module if the program has imported it, or else (), of which nothing is a subclass.

    Before there is an array of a library, it has been imported: nothing optional is imported here.
    """
    return getattr(sys.modules.get(module), name, ())


class Array(NamedTuple):
    """An argument that is an array, as it was found at the entry of a call."""

    data: Any
    library: Library
    dtype: str  # NumPy's name, which tells the other byte order apart
    shape: tuple[int, ...]
    device: Any  # a queue, a device or None: equal for arrays that can be used together
    on_host: bool

    def queue(self) -> Any:
        """The queue on which the array is, or from the host will be."""
        if self.library.device_is == "queue":
            return self.device
        return default_queue() if self.on_host else self.usm().sycl_queue

    def usm(self) -> Any:
        """See `Library.to_usm`."""
        return self.library.to_usm(self.data)

    def numpy(self) -> np.ndarray:
        """The numbers on the host, with `BITS` for dtypes that NumPy does not have."""
        return self.library.to_numpy(self.data) if self.on_host else to_host(self.usm())

    def give(self, result: Any) -> Any:
        """A result that is a USM array, as the user gets it: of this library, and where this array is."""
        return self.library.from_usm(result, self.data)


def describe(x: Any, library: Library) -> Array:
    """What an array of this library is."""
    return library.describe(x)


def library_of(x: Any) -> Library | None:
    """The library of an array, or None where it is none that we know."""
    cls: type = type(x)
    return _library_of_type(cls)


@lru_cache(maxsize=256)
def _library_of_type(cls: type) -> Library | None:
    return next((library for library in LIBRARIES if library.owns(cls)), None)


def dtype_of(x: Any) -> str:
    """The name of the dtype of an array, the same in all libraries; NumPy's names, which tell the other byte order apart."""
    return _name_of(x.dtype)


@lru_cache(maxsize=256, typed=True)  # dtypes of different libraries must not be compared
def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.").removeprefix("array_api_strict.")


def _holds_bits(x: Any, like: Any) -> bool:
    """Whether a USM array holds the bit patterns of the dtype of `like`, which SYCL does not have; an lse does not."""
    return BITS.get(dtype_of(like)) == dtype_of(x)


def from_host(x: np.ndarray, queue: Any) -> Any:
    """A copy of an array of the host, with any strides, in new device memory: dense, in the same order of axes if it was."""
    order = _order_of(x)
    dense = np.ascontiguousarray(_reordered(x, order))
    with device_turn:
        memory = MemoryUSMDevice(max(dense.nbytes, 1), queue=queue)
        if dense.size:
            memory.copy_from_host(dense.reshape(-1).view("u1"))
    return _reordered(usm_array(memory, dense.shape, dense.dtype), _undone(order))


def to_host(x: Any) -> np.ndarray:
    """A copy of a USM array on the host: dense, in the same order of axes if it was.

    `tensor.asnumpy` would copy the whole of the allocation, which may be much larger than the array, and which may not hold a
    whole number of its elements.
    """
    order = _order_of(x)
    dense = _reordered(x, order)
    host = np.empty(dense.shape, dense.dtype)
    with device_turn:
        if not dense.flags.c_contiguous:
            dense = tensor.copy(dense, order="C")
        x.sycl_queue.wait()
        if host.size:
            memory = dense.usm_data if dense.usm_data.nbytes == dense.nbytes else as_usm_memory(dense)
            memory.copy_to_host(host.reshape(-1).view("u1"))
    return _reordered(host, _undone(order))


def _order_of(x: Any) -> tuple[int, ...]:
    """The order of axes in which an array is C-contiguous, or the one that it has where there is none."""
    axes = tuple(range(x.ndim))
    if x.flags.c_contiguous:
        return axes
    order = tuple(sorted(axes, key=lambda axis: -x.strides[axis]))
    return order if _reordered(x, order).flags.c_contiguous else axes


def _reordered(x: Any, order: Sequence[int]) -> Any:
    """A view with the axes in another order."""
    return x.transpose(order) if isinstance(x, np.ndarray) else tensor.permute_dims(x, order)


def _undone(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes that undoes another."""
    return tuple(map(order.index, range(len(order))))


def view(x: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """A view of the whole allocation of a USM array, from an element offset, with any shape and strides."""
    return usm_array(x.usm_data, shape, x.dtype, strides, offset)


def usm_array(memory: Any, shape: tuple[int, ...], dtype: np.dtype, strides: Any = None, offset: int = 0) -> Any:
    """An array in USM memory. dpctl takes the character of a dtype in half the time of the dtype itself."""
    return tensor.usm_ndarray(shape, dtype=dtype.char, buffer=memory, strides=strides, offset=offset)
