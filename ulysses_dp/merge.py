"""Merge attention over different keys: two results become the result over all of these keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._call.checks import check_array, check_device, check_dtype, check_places, shown
from ._device.arrays import Array, tensor
from ._device.copies import copy_arrays
from ._device.dtypes import DTYPES, DType
from ._device.queue import device_turn
from ._device.workspace import empty_like

NAMES = ("out_a", "lse_a", "out_b", "lse_b")


def merge_attention(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, /, *, dtype: str | None = None) -> tuple[Any, Any]:
    """Merge attention of the same queries over two disjoint sets of keys into attention over all of these keys.

    Not collective. Returns when the result is complete.

    Parameters
    ----------
    out_a : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Attention over the first keys, (batch, seq_q, heads, head_dim), or (total_q, heads, head_dim) of packed sequences;
        float32, float64, float16 or bfloat16, any strides.
    lse_a : same kind and device as out_a
        Its logarithm of the softmax denominators, (batch, heads, seq_q) or (heads, total_q); float64 if out_a is float64, else
        float32. Where it is -inf, no key was seen, and out_a is ignored.
    out_b, lse_b : same kinds, dtypes, shapes and device as out_a and lse_a
        The same of the other keys.
    dtype : {"bfloat16"}, optional
        What uint16 arrays hold: the bit patterns of bfloat16 numbers. Needed for these only.

    Returns
    -------
    out : same kind, dtype and device as out_a
        Attention over the keys of both, in the shape of out_a, C-contiguous. Zeros for a query that sees no key.
    lse : same kind, dtype and device as lse_a
        Logarithm of the softmax denominators over the keys of both, in the shape of lse_a, C-contiguous; -inf for a query that
        sees no key.

    Raises
    ------
    TypeError
        An argument is not of a supported kind or dtype, or the kinds or dtypes do not fit each other.
    ValueError
        The shapes do not fit each other, or the arrays are on different queues or devices.
    NotImplementedError
        A torch tensor requires a gradient.

    See Also
    --------
    attention : returns out and lse with `return_lse`.

    Notes
    -----
    With w = exp(lse - max(lse_a, lse_b)) of each part, out is the average of out_a and out_b with the weights w_a and w_b, and
    lse is the maximum + log(w_a + w_b). This is how FlashAttention (Dao et al., arXiv:2205.14135, section 3.1) and ring
    attention (Liu et al., arXiv:2310.01889) join blocks of keys. Merging is associative and commutative up to rounding, and a
    part without keys changes no bit. 16-bit results are computed in float32 and rounded once per merge.

    What counts once per query must be in one part only: the `sinks` of attention. ALiBi and the masks that count positions
    need the positions among all keys, so parts of such attention are not calls of `attention` with some of the keys.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import attention, merge_attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 6, 2, 8), dtype=np.float32)
    >>> first = attention(q, k[:, :4], v[:, :4], return_lse=True)
    >>> last = attention(q, k[:, 4:], v[:, 4:], return_lse=True)
    >>> out, lse = merge_attention(*first, *last)
    >>> bool(np.allclose(out, attention(q, k, v), atol=1e-6))
    True
    """
    # Validate inputs.
    arrays, out_dtype = _check((out_a, lse_a, out_b, lse_b), dtype)
    # Delegate.
    with device_turn:
        out, lse = _merge([x.usm() for x in arrays], out_dtype)
        lse.sycl_queue.wait()
        return arrays[0].give(out), arrays[1].give(lse)


def _check(given: tuple[Any, Any, Any, Any], dtype: Any) -> tuple[list[Array], DType]:
    """Check the arguments; returns what the arrays are, and the dtype of out."""
    arrays = [check_array(name, x) for name, x in zip(NAMES, given, strict=True)]
    out_a = arrays[0]
    for name, x in zip(NAMES, arrays, strict=True):
        if x.library is not out_a.library:
            raise TypeError(f"{name} must be of the kind of out_a, {out_a.library.name}, not {x.library.name}")
    if not isinstance(dtype, str | None):
        raise TypeError(f"dtype must be None or 'bfloat16', not {shown(dtype)}")
    if dtype not in (None, "bfloat16"):
        raise ValueError(f"dtype must be None or 'bfloat16', not {dtype!r}")
    if len(out_a.shape) not in (3, 4):
        raise ValueError(
            f"out_a must have the axes (batch, seq, heads, head_dim) or (total, heads, head_dim), not shape {out_a.shape}"
        )
    if dtype and out_a.dtype in DTYPES and out_a.dtype != dtype:
        raise TypeError(f"dtype is {dtype!r}, but out_a has dtype {out_a.dtype}; expected uint16 or bfloat16")
    out_dtype = DTYPES[check_dtype("out_a", out_a, dtype)]
    *_, rows, heads, _ = out_a.shape
    of_out = out_a.shape, out_a.dtype
    of_lse = (*out_a.shape[:-3], heads, rows), out_dtype.compute
    for name, x, (shape, expected) in zip(NAMES, arrays, 2 * (of_out, of_lse), strict=True):
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape {shape} that fits out_a, not {x.shape}")
        if x.dtype != expected:
            raise TypeError(f"{name} must have the dtype {expected} that fits out_a, not {x.dtype}")
    check_places(NAMES, arrays)
    check_device(out_a)
    return arrays, out_dtype


def _merge(arrays: list[Any], dtype: DType) -> tuple[Any, Any]:
    """The same of USM arrays."""
    out_a, lse_a, out_b, lse_b = arrays
    highest = tensor.maximum(lse_a, lse_b)
    highest = tensor.where(tensor.isinf(highest), 0, highest)  # inf - inf would be nan
    weight_a, weight_b = (tensor.exp(lse - highest) for lse in (lse_a, lse_b))
    total = weight_a + weight_b
    # Weights of exp(lse - merged lse) would get the rounding error of the merged lse, 3e-5 in float32 if it is 1000.
    parts = [
        _part(weight / total, lse == -np.inf, _converted(out, dtype.compute))
        for weight, lse, out in ((weight_a, lse_a, out_a), (weight_b, lse_b, out_b))
    ]
    out = tensor.add(*parts, order="C")
    lse = tensor.add(highest, tensor.log(total), order="C")
    return _converted(out, dtype.stored), lse


def _part(weight: Any, unseen: Any, out: Any) -> Any:
    """The share of one part in the average; nothing, whatever `out` holds, where it has seen no key."""
    weight, unseen = (tensor.expand_dims(_rows_first(x), axis=-1) for x in (weight, unseen))
    return tensor.where(unseen, 0, weight * out)


def _rows_first(x: Any) -> Any:
    """(batch, heads, seq) or (heads, total) in the order of axes of out."""
    return tensor.permute_dims(x, (0, 2, 1) if x.ndim == 3 else (1, 0))


def _converted(x: Any, dtype: str) -> Any:
    """The numbers of a USM array in another dtype, by the conversion that attention has."""
    if x.dtype == dtype:
        return x
    result = empty_like(x, x.shape, dtype)
    packed = x.ndim == 3
    copy_arrays([x[None, ...] if packed else x], [result[None, ...] if packed else result])
    return result
