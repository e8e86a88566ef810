"""The options of attention: their checks, what all ranks must agree on, and the part of them that one rank's heads need.

Options that are arrays are global: they cover all rows and all heads, and every rank passes the same.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ulysses_dp.kernels.flash_forward import Extras

from .._device.arrays import dtype_of, kind_of, on_host, tensor, to_numpy, to_usm
from ..backends import backend_for
from .checks import NAMES, Geometry, Names, check_flag, check_inputs, check_integer, check_kind, device_of
from .layout import PACKED, Layout
from .spans import UNLIMITED, spans, trim

if TYPE_CHECKING:
    from ..backends import Backend

MAX_SCALE = 1e30  # beyond, the scale itself would overflow float32
BIAS_DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class Options:
    """The options of a call, checked."""

    softmax_scale: float
    causal: bool
    return_lse: bool
    backend: Backend
    layout: Layout
    window_size: tuple[int, int]
    softcap: float
    dropout_p: float
    seed: int
    alibi_slopes: np.ndarray | None  # (1 or batch, heads), float64
    sinks: np.ndarray | None  # (heads,), float64
    key_padding_mask: np.ndarray | None  # (1 or batch, seq_k), bool
    bias: Any  # the user's array, 4-D
    cu_seqlens_q: tuple[int, ...] | None
    cu_seqlens_k: tuple[int, ...] | None

    @property
    def plain(self) -> bool:
        """Whether there is no option that needs more than the causal kernel."""
        return (
            self.window_size == UNLIMITED
            and not (self.softcap or self.dropout_p)
            and all(x is None for x in (self.alibi_slopes, self.sinks, self.key_padding_mask, self.bias, self.cu_seqlens_q))
        )

    def diagonal(self, seq_q: int, seq_k: int) -> int:
        """Query i of the plain kernel sees the keys up to i + this."""
        return seq_k - seq_q if self.causal else seq_k

    def common(self) -> dict[str, str]:
        """What must be the same on all ranks, as text by name. Of the bias, which may be large, its shape and dtype."""
        texts = {}
        for field in fields(self):
            value = getattr(self, field.name)
            name = {"backend": "attn_type"}.get(field.name, field.name)
            if name == "layout" and not isinstance(value, str):
                name = "axes"  # `UlyssesAttention` has them from scatter_idx and gather_idx
            if name == "bias" and value is not None:
                texts[name] = f"{tuple(value.shape)} {dtype_of(value)}"
            elif isinstance(value, np.ndarray):
                texts[name] = f"{value.shape} with digest {_digest(value.tobytes())}"
            elif isinstance(value, tuple) and len(value) > 8:
                texts[name] = f"{len(value)} numbers with digest {_digest(repr(value).encode())}"
            else:
                texts[name] = str(value)
        return texts

    def check_lengths(self, function: str, seq_q: int, seq_k: int) -> None:
        """Check the options against the rows of all ranks. All ranks know these, so all raise the same."""
        for name, ends, rows in (("cu_seqlens_q", self.cu_seqlens_q, seq_q), ("cu_seqlens_k", self.cu_seqlens_k, seq_k)):
            if ends is not None and ends[-1] != rows:
                raise ValueError(f"{function}: {name} must end with the {rows} rows of all ranks, not with {ends[-1]}")
        if self.key_padding_mask is not None and self.key_padding_mask.shape[1] != seq_k:
            shape = self.key_padding_mask.shape
            raise ValueError(f"{function}: key_padding_mask must be (batch, {seq_k}), one for every key, not {shape}")
        if self.bias is not None:
            for axis, size in ((2, seq_q), (3, seq_k)):
                if self.bias.shape[axis] not in (1, size):
                    raise ValueError(
                        f"{function}: bias must be broadcastable to (batch, heads, {seq_q}, {seq_k}), "
                        f"not {tuple(self.bias.shape)}"
                    )

    def extras(self, q: Any, seq_k: int, first_head: int, dtype: Any = None) -> Extras | None:
        """The options for the heads of USM array q, the first of which has this number; None where the plain kernel will do.

        The bias is of this dtype, that of q by default.
        """
        if self.plain:
            return None
        batch, seq_q, heads, _ = q.shape
        mine = slice(first_head, first_head + heads)
        table = spans(
            seq_q,
            seq_k,
            causal=self.causal,
            window_size=self.window_size,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
        )
        if self.key_padding_mask is not None:
            table = trim(table, np.any(self.key_padding_mask, axis=0))
        bias = None if self.bias is None else self.local_bias(q, mine, dtype or q.dtype)
        return Extras(
            spans=table,
            softcap=self.softcap,
            slopes=None if self.alibi_slopes is None else self.alibi_slopes[:, mine],
            sinks=None if self.sinks is None else self.sinks[mine],
            bias=None if bias is None else tensor.broadcast_to(bias, (batch, heads, seq_q, seq_k)),
            padding=self.key_padding_mask,
            dropout_p=self.dropout_p,
            seed=self.seed,
            first_head=first_head,
        )

    def local_bias(self, q: Any, heads: slice, dtype: Any) -> Any:
        """The bias of some heads as a USM array on the queue of q; what strides of 0 repeat is there once."""
        kind = kind_of(self.bias)
        x = to_numpy(self.bias, kind) if on_host(self.bias, kind) else to_usm(self.bias)
        x = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]
        if x.shape[1] > 1:
            x = x[:, heads]
        if dtype_of(self.bias) == "bfloat16":
            x = _bfloat16_to_float32(x if on_host(self.bias, kind) else tensor.asnumpy(x))
        return tensor.asarray(x, dtype=dtype, sycl_queue=q.sycl_queue)


def check_attention(
    q: Any, k: Any, v: Any, names: Names = NAMES, *, layout: Any, dtype: Any = None, backward: bool = False, **options: Any
) -> tuple[tuple[Any, Any, Any], Geometry, Options]:
    """Check all arguments of a call of attention; returns q, k and v as views (batch, seq, heads, head_dim)."""
    views, geometry = check_inputs(q, k, v, names, layout, dtype)
    settings = check_options(geometry, views, names, layout=layout, **options)
    backend = settings.backend.for_call(views[0], device_of(q), geometry, settings, backward=backward)
    if backend is not settings.backend:
        settings = replace(settings, backend=backend)
    return views, geometry, settings


def check_options(
    geometry: Geometry,
    views: tuple[Any, Any, Any],
    names: Names,
    *,
    layout: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    return_lse: Any,
    attn_type: Any,
    bias: Any = None,
    key_padding_mask: Any = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Options:
    """Check the options, as far as that goes without the rows of the other ranks; the default of the scale is filled in."""
    for name, flag in (("causal", causal), (names.return_lse, return_lse)):
        check_flag(name, flag)
    backend = backend_for(attn_type)
    cu_seqlens_q = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q)
    cu_seqlens_k = _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k)
    if layout == PACKED:
        if cu_seqlens_q is None:
            raise ValueError("cu_seqlens_q must be given with layout 'thd'")
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        if len(cu_seqlens_k) != len(cu_seqlens_q):
            lengths = f"{len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have the same length, not {lengths}")
    elif cu_seqlens_q is not None or cu_seqlens_k is not None:
        name = "cu_seqlens_k" if cu_seqlens_q is None else "cu_seqlens_q"
        raise ValueError(f"{name} is for layout 'thd', not {layout!r}")
    window = _check_window(window_size)
    if window == (-1, 0):  # the plain kernel has that, too
        causal, window = True, UNLIMITED
    batch, heads = geometry.batch, geometry.heads
    packed = layout == PACKED
    return Options(
        softmax_scale=_check_scale(softmax_scale, geometry.head_dim),
        causal=bool(causal),
        return_lse=bool(return_lse),
        backend=backend,
        layout=layout,
        window_size=window,
        softcap=_check_softcap(softcap),
        dropout_p=_check_dropout(dropout_p, seed),
        seed=0 if seed is None else _check_seed(seed),
        alibi_slopes=_check_numbers("alibi_slopes", alibi_slopes, [(heads,)] + [(batch, heads)] * (not packed), heads),
        sinks=None if sinks is None else _check_numbers("sinks", sinks, [(heads,)], heads)[0],  # type: ignore[index]
        key_padding_mask=_check_mask(key_padding_mask, batch),
        bias=_check_bias(bias, views[0], batch, heads),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )


def _check_scale(scale: Any, head_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(head_dim)
    size: Any = abs(_check_real("softmax_scale", scale, " or None"))
    if not size < math.inf:
        raise ValueError(f"softmax_scale must be finite, not {scale}")
    if size > MAX_SCALE:
        raise ValueError(f"softmax_scale must be at most {MAX_SCALE:g} in size, not {scale}")
    return float(scale)


def _check_window(window_size: Any) -> tuple[int, int]:
    if not isinstance(window_size, tuple | list | np.ndarray) or len(window_size) != 2:
        raise TypeError(f"window_size must be two integers (left, right), not {window_size!r}")
    for n in window_size:
        check_integer("window_size", n)
        if n < -1:
            raise ValueError(f"window_size must be at least 0, or -1 for no limit, not {tuple(window_size)}")
    left, right = window_size
    return int(left), int(right)


def _check_softcap(softcap: Any) -> float:
    if _check_real("softcap", softcap) != 0 and not 1 / MAX_SCALE <= softcap <= MAX_SCALE:
        raise ValueError(f"softcap must be from {1 / MAX_SCALE:g} to {MAX_SCALE:g}, or 0 for none, not {softcap}")
    return float(softcap)


def _check_dropout(dropout_p: Any, seed: Any) -> float:
    if not 0 <= _check_real("dropout_p", dropout_p) < 1:
        raise ValueError(f"dropout_p must be from 0 to less than 1, not {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"seed must be given with dropout_p = {dropout_p}: all ranks have to draw the same numbers")
    return float(dropout_p)


def _check_seed(seed: Any) -> int:
    check_integer("seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, not {seed}")
    return int(seed)


def _check_real(name: str, x: Any, alternative: str = "") -> Any:
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        raise TypeError(f"{name} must be a real number{alternative}, not {type(x).__name__}")
    return x


def _small_array(name: str, x: Any) -> np.ndarray:
    """A small array of any kind, or a sequence of numbers, on the host."""
    kind = kind_of(x)
    if kind is not None:
        check_kind(name, x)
        return to_numpy(x, kind) if on_host(x, kind) else tensor.asnumpy(to_usm(x))
    if not isinstance(x, list | tuple):
        raise TypeError(f"{name} must be an array or a sequence, not {type(x).__module__}.{type(x).__qualname__}")
    return np.asarray(x)


def _bfloat16_to_float32(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _check_numbers(name: str, x: Any, shapes: list[tuple[int, ...]], heads: int) -> np.ndarray | None:
    """Check real numbers, some for every head; as (1 or batch, heads), float64."""
    if x is None:
        return None
    array = _small_array(name, x)
    if kind_of(x) is not None and dtype_of(x) == "bfloat16":
        array = _bfloat16_to_float32(array)
    if array.dtype.kind not in "fi":
        raise TypeError(f"{name} must be real numbers, not {array.dtype}")
    if not (abs(array[~np.isneginf(array)] if name == "sinks" else array) <= MAX_SCALE).all():
        raise ValueError(f"{name} must be finite and at most {MAX_SCALE:g} in size")
    if array.shape not in shapes:
        expected = " or ".join(f"{shape}" for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must have shape {expected}, one for every head, not {array.shape}")
    return array.astype(np.float64).reshape(-1, heads) if heads else np.empty((1, 0))


def _check_mask(mask: Any, batch: int) -> np.ndarray | None:
    if mask is None:
        return None
    array = _small_array("key_padding_mask", mask)
    if array.dtype != bool:
        raise TypeError(f"key_padding_mask must be bool, not {array.dtype}")
    if array.ndim != 2 or array.shape[0] != batch:
        raise ValueError(f"key_padding_mask must be ({batch}, seq_k), one for every key, not {array.shape}")
    return array


def _check_bias(bias: Any, q: Any, batch: int, heads: int) -> Any:
    if bias is None:
        return None
    kind = check_kind("bias", bias)
    if dtype_of(bias) not in BIAS_DTYPES:
        raise TypeError(f"bias has dtype {dtype_of(bias)}; supported are {', '.join(BIAS_DTYPES)}")
    shape = tuple(bias.shape)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise ValueError(f"bias must be broadcastable to ({batch}, {heads}, seq_q, seq_k), with 4 axes, not {shape}")
    if not on_host(bias, kind) and (on_host(q, kind_of(q)) or to_usm(bias).sycl_queue != to_usm(q).sycl_queue):
        raise ValueError(f"bias must be on the host or on the queue of q, not {kind.value} elsewhere")
    return bias


def _check_cu_seqlens(name: str, x: Any) -> tuple[int, ...] | None:
    if x is None:
        return None
    array = _small_array(name, x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.ndim != 1 or array.size < 1:
        raise ValueError(f"{name} must have one axis and at least one number, not shape {array.shape}")
    numbers = tuple(map(int, array))
    if numbers[0] != 0 or any(b < a for a, b in pairwise(numbers)):
        raise ValueError(f"{name} must start with 0 and not decrease, not {_shorten(numbers)}")
    return numbers


def _shorten(numbers: tuple[int, ...]) -> str:
    return f"{numbers}" if len(numbers) <= 8 else f"({', '.join(map(str, numbers[:8]))}, …)"


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()
