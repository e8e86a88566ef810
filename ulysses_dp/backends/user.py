"""A function of the user as the local attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .._device.arrays import describe, library_of, tensor
from .._device.copies import copy_arrays
from .._device.dtypes import held_by
from ._base import Backend, compute_dtype
from .dense import add_up, for_query_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._call.checks import Geometry
    from .._call.options import Options
    from .._device.arrays import Array
    from .._ranks.partition import HeadMap


@dataclass(frozen=True, eq=False)
class UserAttention(Backend):
    """What `register_attention` returns: the functions, which get and return arrays of the kind that the call was given."""

    name: str
    function: Callable[..., Any]
    gradient: Callable[..., Any] | None = None
    like: Array | None = field(default=None, repr=False)  # q of the call

    def for_call(
        self, q: Array, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()
    ) -> Backend:
        backend = replace(self, like=q)
        backend.check(device, geometry, options, backward=backward, more=more)
        return backend

    @property
    def _like(self) -> Array:
        assert self.like is not None
        return self.like

    def check(self, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()) -> None:
        names = list(_given(options, self._like.dtype))
        if backward and self.gradient is None:
            raise NotImplementedError(f"attn_type {self.name} has no backward; register_attention takes one")
        if backward:
            _check_signature(self.name, self.gradient, ["dout", "q", "k", "v"], ["lse", "delta", *names])
        else:
            _check_signature(self.name, self.function, ["q", "k", "v"], [*names, "return_lse"])

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        arrays = q, *self._equal_groups(q, k, v, heads)
        keywords = self._keywords(q, options, heads) | {"return_lse": lse is not None}
        results = self.function(*map(self._give, arrays), **keywords)
        if lse is None:
            result = results[0] if isinstance(results, tuple | list) and results else results
        else:
            result, of_rows = self._unpack(results, ("out", "lse"))
            lse[...] = self._take("lse", of_rows, lse.shape, str(lse.dtype))
        copy_arrays((self._take("out", result, out.shape, self._like.dtype),), (out,))

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        assert self.gradient is not None
        dout, q, k, v, lse, delta = arrays
        inputs = q, *self._equal_groups(q, k, v, heads)
        keywords = {"lse": self._give(lse), "delta": self._give(delta)} | self._keywords(q, options, heads)
        results = self.gradient(*map(self._give, (dout, *inputs)), **keywords)
        names = "dq", "dk", "dv"
        for name, result, x, grad in zip(names, self._unpack(results, names), inputs, grads, strict=True):
            taken = self._take(name, result, x.shape, self._like.dtype)
            if x.shape == grad.shape:
                copy_arrays((taken,), (grad,))
            else:
                add_up(taken, grad, heads)

    @staticmethod
    def _equal_groups(q: Any, k: Any, v: Any, heads: HeadMap) -> Sequence[Any]:
        """k and v with as many query heads to each kv head: as they are, or with a kv head for every query head."""
        return (k, v) if heads.uniform(q.shape[2], k.shape[2]) else for_query_heads(k, v, q, heads)

    def _keywords(self, q: Any, options: Options, heads: HeadMap) -> dict[str, Any]:
        """The options as the functions take them: arrays of the kind of the call, for the heads of q."""
        mine = slice(heads.first, heads.first + q.shape[2])
        compute = compute_dtype(q)

        def as_kind(x: np.ndarray, dtype: Any) -> Any:
            return self._give(tensor.asarray(np.ascontiguousarray(x, dtype), sycl_queue=q.sycl_queue))

        def slopes(x: np.ndarray) -> np.ndarray:
            return x[0, mine] if len(x) == 1 else x[:, mine]

        converted: dict[str, Callable[[Any], Any]] = {
            "alibi_slopes": lambda x: as_kind(slopes(x), compute),
            "sinks": lambda x: as_kind(x[mine], compute),
            "key_padding_mask": lambda x: as_kind(x, bool),
            "cu_seqlens_q": lambda x: as_kind(x, np.int32),
            "cu_seqlens_k": lambda x: as_kind(x, np.int32),
            "seqused_q": lambda x: as_kind(x, np.int32),
            "seqused_k": lambda x: as_kind(x, np.int32),
            "key_ranges": lambda x: as_kind(x, np.int64),
            "bias": lambda _: self._give(options.local_bias(q, mine, compute)),
        }
        return {name: converted[name](x) if name in converted else x for name, x in _given(options, self._like.dtype).items()}

    def _give(self, x: Any) -> Any:
        """A USM array as the user's functions get it."""
        return self._like.give(x)

    def _unpack(self, results: Any, names: tuple[str, ...]) -> Sequence[Any]:
        if not isinstance(results, tuple | list) or len(results) != len(names):
            came = f"{len(results)} results" if isinstance(results, tuple | list) else type(results).__qualname__
            raise TypeError(f"attn_type {self.name} must return ({', '.join(names)}), not {came}")
        return results

    def _take(self, name: str, x: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """A result of the user's functions as a USM array, checked."""
        like, library, subject = self._like, library_of(x), f"attn_type {self.name} must return {name}"
        if library is not like.library:
            raise TypeError(f"{subject} as {like.library.name}, not {library.name if library else type(x).__qualname__}")
        array = describe(x, like.library)
        if array.dtype != dtype:
            raise TypeError(f"{subject} with dtype {dtype}, not {array.dtype}")
        if array.shape != tuple(shape):
            raise ValueError(f"{subject} with shape {tuple(shape)}, not {array.shape}")
        if array.device != like.device:
            raise ValueError(f"{subject} where q is, on {like.device}, not on {array.device}")
        return array.usm()


def _given(options: Options, dtype: str) -> dict[str, Any]:
    """Scale and causal, and what else the user has set, by the names of the public functions."""
    given = {"softmax_scale": options.softmax_scale, "causal": options.causal} | options.given
    numbers = held_by(dtype)
    return given if numbers == dtype else given | {"dtype": numbers}  # bit patterns do not say what they are


def _check_signature(name: str, function: Any, arrays: list[str], keywords: list[str]) -> None:
    """Whether a function takes the arrays by position and the options by keyword, as far as it tells."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some compiled functions have none
        return
    try:
        signature.bind(*arrays, **dict.fromkeys(keywords))
    except TypeError as error:
        call = ", ".join(arrays + [f"{keyword}=…" for keyword in keywords])
        raise NotImplementedError(f"attn_type {name} cannot be called with ({call}): {error}") from error
