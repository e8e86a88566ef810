"""Merge attention over different keys: two results become the result over all of these keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._call.checks import COMPUTE_DTYPES, check_aspects, check_kind, check_places
from ._device.arrays import dtype_of, from_usm, tensor, to_usm

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
    name = _check((out_a, lse_a, out_b, lse_b), dtype)
    # Delegate.
    out, lse = _merge(*map(to_usm, (out_a, lse_a, out_b, lse_b)), bfloat16=name == "bfloat16")
    lse.sycl_queue.wait()
    return from_usm(out, out_a), from_usm(lse, lse_a)


def _check(arrays: tuple[Any, Any, Any, Any], dtype: Any) -> str:
    """Check the arguments; returns the name of the dtype of the results."""
    kinds = [check_kind(name, x) for name, x in zip(NAMES, arrays, strict=True)]
    for name, kind in zip(NAMES, kinds, strict=True):
        if kind is not kinds[0]:
            raise TypeError(f"{name} must be of the kind of out_a, {kinds[0].value}, not {kind.value}")
    if not (dtype is None or (isinstance(dtype, str) and dtype == "bfloat16")):
        error = ValueError if isinstance(dtype, str) else TypeError
        raise error(f"dtype must be None or 'bfloat16', not {dtype!r}")
    out_a = arrays[0]
    if out_a.ndim not in (3, 4):
        raise ValueError(
            "out_a must have the axes (batch, seq, heads, head_dim) or (total, heads, head_dim), "
            f"not shape {tuple(out_a.shape)}"
        )
    given = dtype_of(out_a)
    out_dtype = "bfloat16" if dtype and given == "uint16" else given
    if out_dtype not in COMPUTE_DTYPES:
        hint = "; for bfloat16 in uint16 arrays give dtype='bfloat16'" if given == "uint16" else ""
        raise TypeError(f"out_a has dtype {given}; supported are {', '.join(COMPUTE_DTYPES)} in native byte order{hint}")
    if dtype and out_dtype != dtype:
        raise TypeError(f"dtype is {dtype!r}, but out_a has dtype {given}; expected uint16 or bfloat16")
    *_, rows, heads, _ = out_a.shape
    shapes = tuple(out_a.shape), (*out_a.shape[:-3], heads, rows)
    dtypes = given, COMPUTE_DTYPES[out_dtype]
    for number, (name, x) in enumerate(zip(NAMES, arrays, strict=True)):
        if tuple(x.shape) != shapes[number % 2]:
            raise ValueError(f"{name} must have the shape {shapes[number % 2]} that fits out_a, not {tuple(x.shape)}")
        if dtype_of(x) != dtypes[number % 2]:
            raise TypeError(f"{name} must have the dtype {dtypes[number % 2]} that fits out_a, not {dtype_of(x)}")
    check_places(NAMES, arrays, kinds[0])
    check_aspects(out_a, ("float64", "fp64"), ("float16", "fp16"))
    return out_dtype


def _merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, bfloat16: bool) -> tuple[Any, Any]:
    """The same of USM arrays."""
    highest = tensor.maximum(lse_a, lse_b)
    highest = tensor.where(tensor.isinf(highest), 0, highest)  # inf - inf would be nan
    weight_a, weight_b = (tensor.exp(lse - highest) for lse in (lse_a, lse_b))
    total = weight_a + weight_b
    # Weights of exp(lse - merged lse) would get the rounding error of the merged lse, 3e-5 in float32 if it is 1000.
    parts = [
        _part(weight / total, lse == -np.inf, _to_float32(out, bfloat16))
        for weight, lse, out in ((weight_a, lse_a, out_a), (weight_b, lse_b, out_b))
    ]
    out = tensor.add(*parts, order="C")
    lse = tensor.add(highest, tensor.log(total), order="C")
    return _to_bfloat16(out) if bfloat16 else tensor.astype(out, out_a.dtype, copy=False), lse


def _part(weight: Any, unseen: Any, out: Any) -> Any:
    """The share of one part in the average; nothing, whatever `out` holds, where it has seen no key."""
    weight, unseen = (tensor.expand_dims(_rows_first(x), axis=-1) for x in (weight, unseen))
    return tensor.where(unseen, 0, weight * out)


def _rows_first(x: Any) -> Any:
    """(batch, heads, seq) or (heads, total) in the order of axes of out."""
    return tensor.permute_dims(x, (0, 2, 1) if x.ndim == 3 else (1, 0))


def _to_float32(x: Any, bfloat16: bool) -> Any:
    """The numbers as float32, or as they are if they are float64."""
    if bfloat16:
        bits = tensor.astype(x, "uint32", order="C") << 16
        return tensor.usm_ndarray(bits.shape, dtype="float32", buffer=bits.usm_data)
    return tensor.astype(x, "float32", copy=False) if x.dtype == np.float16 else x


def _to_bfloat16(x: Any) -> Any:
    """C-contiguous float32 numbers rounded to the nearest bfloat16, ties to even, as uint16."""
    bits = tensor.usm_ndarray(x.shape, dtype="uint32", buffer=x.usm_data)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return tensor.astype(tensor.where(tensor.isnan(x), 0x7FC0, rounded), "uint16")
