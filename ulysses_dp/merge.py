"""Merge attention over different keys: partial results become the result over all of these keys."""

from __future__ import annotations

from functools import reduce
from itertools import count
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._call.checks import check_array, check_device, check_dtype, check_same_device, shown
from ._device.arrays import Array, tensor
from ._device.copies import copy_arrays
from ._device.dtypes import BITS, DTYPES, DType
from ._device.queue import device_turn
from ._device.workspace import empty_like

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BITS = " or ".join(map(repr, BITS))


def merge_attention(
    out_a: Any, lse_a: Any, /, *others: Any, out: tuple[Any, Any] | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """Merge attention of the same queries over disjoint sets of keys into attention over all of these keys.

    Not collective. Returns when the result is complete.

    Parameters
    ----------
    out_a : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Attention over the first keys, (batch, seq_q, heads, head_dim), or (total_q, heads, head_dim) of packed sequences;
        float32, float64, float16 or bfloat16, any strides.
    lse_a : same kind and device as out_a
        Its logarithm of the softmax denominators, (batch, heads, seq_q) or (heads, total_q); float64 if out_a is float64, else
        float32. Where it is -inf, no key was seen, and out_a is ignored.
    *others : same kinds, shapes and device as out_a and lse_a
        The same of other keys, in turns, for any number of parts: out_b, lse_b, out_c, lse_c and so on. Unless out_a is
        float64, every out may be float32, float16 or bfloat16.
    out : tuple of two arrays, optional
        Where the results are written, of the kinds and shapes of out_a and lse_a: they may be these, or those of another part.
        With 16-bit parts, float32 keeps a running result that is not rounded in between.
    dtype : {"bfloat16"}, optional
        What uint16 arrays hold: the bit patterns of bfloat16 numbers. Needed for these only.

    Returns
    -------
    out : same kind, dtype and device as out_a
        Attention over the keys of all parts, in the shape of out_a, C-contiguous. Zeros for a query that sees no key. Or the
        first array of `out`.
    lse : same kind, dtype and device as lse_a
        Logarithm of the softmax denominators over the keys of all parts, in the shape of lse_a, C-contiguous; -inf for a query
        that sees no key. Or the second array of `out`.

    Raises
    ------
    TypeError
        An argument is not of a supported kind or dtype, or the kinds or dtypes do not fit each other.
    ValueError
        The shapes do not fit each other, an out has no lse, or the arrays are on different queues or devices.
    NotImplementedError
        A torch tensor requires a gradient.

    See Also
    --------
    attention : returns out and lse with `return_lse`.
    merge_attention_backward : the gradient.

    Notes
    -----
    With w = exp(lse - largest lse) of each part, out is the average of the parts with the weights w, and lse is the largest
    one + log(sum of w). This is how FlashAttention (Dao et al., arXiv:2205.14135, section 3.1) and ring attention (Liu et al.,
    arXiv:2310.01889) join blocks of keys. Merging is associative and commutative up to rounding, and a part without keys
    changes no bit. 16-bit parts are merged in float32, and the result is rounded once per call.

    What counts once per query must be in one part only: the `sinks` of attention. ALiBi and the masks that count positions
    need the positions among all keys, so parts of such attention are not calls of `attention` with some of the keys.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import attention, merge_attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 6, 2, 8), dtype=np.float32)
    >>> parts = [attention(q, k[:, i : i + 2], v[:, i : i + 2], return_lse=True) for i in (0, 2, 4)]
    >>> out, lse = merge_attention(*parts[0], *parts[1], *parts[2])
    >>> bool(np.allclose(out, attention(q, k, v), atol=1e-6))
    True
    """
    # Validate inputs.
    given = _check((out_a, lse_a, *others), dtype, {} if out is None else _pair(out))
    # Delegate.
    with device_turn:
        parts = _parts(given.arrays)
        result = given.targets[0] if given.targets else given.arrays[0]
        merged, lse = _merge(parts, _dtype("out", result, dtype))
        lse.sycl_queue.wait()
        if out is None:
            return given.arrays[0].give(merged), given.arrays[1].give(lse)
        for x, target in zip((merged, lse), given.targets, strict=True):
            target.data[...] = target.give(x)
        lse.sycl_queue.wait()
        return out[0], out[1]


def merge_attention_backward(
    dout: Any, dlse: Any, out_a: Any, lse_a: Any, /, *others: Any, dtype: str | None = None
) -> tuple[Any, ...]:
    """Gradient of `merge_attention`: the vector-Jacobian product for cotangents of its results.

    Not collective. Returns when the results are complete.

    Parameters
    ----------
    dout : same kind, shape and device as out_a
        Gradient of a loss by the merged out; any dtype that an out may have.
    dlse : same kind, dtype, shape and device as lse_a, or None
        Gradient of the loss by the merged lse; None if it does not depend on it.
    out_a, lse_a, *others : arrays
        What `merge_attention` was given.
    dtype : {"bfloat16"}, optional
        As in `merge_attention`.

    Returns
    -------
    tuple of arrays
        The gradients by all parts, dout_a, dlse_a, dout_b, dlse_b and so on, of their kinds, dtypes and shapes. Zeros where a
        part has seen no key.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `merge_attention` does.

    See Also
    --------
    merge_attention : the forward pass.

    Notes
    -----
    With lse = log(sum of exp(lse_i)) and p_i = exp(lse_i - lse), the forward pass is out = sum of p_i out_i. The derivative by
    lse_i of lse is p_i, and that of p_j is -p_j p_i, to which j = i adds p_i: that of out is p_i (out_i - out). Hence, where ·
    sums over head_dim, ::

        dout_i = p_i dout
        dlse_i = p_i (dlse + dout · out_i - dout · out),    dout · out = sum of p_j (dout · out_j)

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import attention, merge_attention_backward
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 1, 6, 2, 8))
    >>> parts = [attention(q, k[:, i : i + 3], v[:, i : i + 3], return_lse=True) for i in (0, 3)]
    >>> dout_a, dlse_a, dout_b, dlse_b = merge_attention_backward(dout, None, *parts[0], *parts[1])
    >>> bool(np.allclose(dout_a + dout_b, dout)), bool(np.allclose(dlse_a + dlse_b, 0))
    (True, True)
    """
    # Validate inputs.
    more = {"dout": dout} | ({} if dlse is None else {"dlse": dlse})
    given = _check((out_a, lse_a, *others), dtype, more)
    # Delegate.
    with device_turn:
        gradients = _differentiate(_parts(given.arrays), *(x.usm() for x in given.targets))
        for x in gradients:
            x.sycl_queue.wait()
        return tuple(x.give(_converted(y, _stored(x))) for x, y in zip(given.arrays, gradients, strict=True))


class _Given(NamedTuple):
    """The arguments, as they were found."""

    arrays: list[Array]  # out_a, lse_a, out_b, lse_b, ...
    targets: list[Array]  # an out and perhaps an lse that go with them


def _names() -> Iterator[str]:
    """out_a, lse_a, out_b, lse_b, ..."""
    for n in count():
        letter = ascii_lowercase[n] if n < len(ascii_lowercase) else str(n)
        yield from (f"out_{letter}", f"lse_{letter}")


def _pair(out: Any) -> dict[str, Any]:
    """What results are written to, by name."""
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(f"out must be a tuple of two arrays, for out and lse, not {shown(out)}")
    return dict(zip(("out[0]", "out[1]"), out, strict=True))


def _check(given: Sequence[Any], dtype: Any, more: dict[str, Any]) -> _Given:
    """Check the parts, and an out and perhaps an lse that go with them."""
    if len(given) % 2:
        raise ValueError(f"every out must be followed by its lse; there are {len(given)} arrays")
    named = dict(zip(_names(), given, strict=False)) | more
    arrays = {name: check_array(name, x) for name, x in named.items()}
    out_a = arrays["out_a"]
    for name, x in arrays.items():
        if x.library is not out_a.library:
            raise TypeError(f"{name} must be of the kind of out_a, {out_a.library.name}, not {x.library.name}")
    if not isinstance(dtype, str | None):
        raise TypeError(f"dtype must be None or {_BITS}, not {shown(dtype)}")
    if dtype not in (None, *BITS):
        raise ValueError(f"dtype must be None or {_BITS}, not {dtype!r}")
    if len(out_a.shape) not in (3, 4):
        raise ValueError(
            f"out_a must have the axes (batch, seq, heads, head_dim) or (total, heads, head_dim), not shape {out_a.shape}"
        )
    if dtype and out_a.dtype in DTYPES and not any(x.dtype in (dtype, BITS[dtype]) for x in arrays.values()):
        raise TypeError(f"dtype is {dtype!r}, but out_a has dtype {out_a.dtype}; expected {BITS[dtype]} or {dtype}")
    compute = _dtype("out_a", out_a, dtype).compute
    *_, rows, heads, _ = out_a.shape
    lse_shape = *out_a.shape[:-3], heads, rows
    for number, (name, x) in enumerate(arrays.items()):
        shape = lse_shape if number % 2 else out_a.shape
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape {shape} that fits out_a, not {x.shape}")
        if number % 2 and x.dtype != compute:
            raise TypeError(f"{name} must have the dtype {compute} that fits out_a, not {x.dtype}")
        if not number % 2 and _dtype(name, x, dtype).compute != compute:
            fitting = " or ".join(known for known, row in DTYPES.items() if row.compute == compute)
            raise TypeError(f"{name} must have the dtype {fitting} that fits out_a, not {x.dtype}")
    check_same_device(list(arrays), list(arrays.values()))
    check_device(out_a)
    known = list(arrays.values())
    return _Given(known[: len(given)], known[len(given) :])


def _dtype(name: str, x: Array, dtype: str | None) -> DType:
    """The dtype of an out; `dtype` says only what arrays of bit patterns hold."""
    return DTYPES[check_dtype(name, x, dtype if x.dtype in BITS.values() else None)]


def _stored(x: Array) -> str:
    """The dtype of a USM array with the numbers of an array."""
    return DTYPES[x.dtype].stored if x.dtype in DTYPES else x.dtype


def _parts(arrays: Sequence[Array]) -> list[tuple[Any, Any]]:
    """The USM arrays of every part."""
    usm = [x.usm() for x in arrays]
    return list(zip(usm[::2], usm[1::2], strict=True))


def _weights(lses: Sequence[Any]) -> tuple[list[Any], Any]:
    """The share of every part, and the merged lse."""
    highest = reduce(tensor.maximum, lses)
    highest = _where(tensor.isinf(highest), 0, highest)  # inf - inf would be nan
    weights = [tensor.exp(lse - highest) for lse in lses]
    total = reduce(tensor.add, weights)
    # Weights of exp(lse - merged lse) would get the rounding error of the merged lse, 3e-5 in float32 if it is 1000.
    return [weight / total for weight in weights], tensor.add(highest, tensor.log(total), order="C")


def _merge(parts: Sequence[tuple[Any, Any]], dtype: DType) -> tuple[Any, Any]:
    """The same of USM arrays."""
    weights, lse = _weights([lse for _, lse in parts])
    shares = (_share(weight, lse, _converted(out, dtype.compute)) for weight, (out, lse) in zip(weights, parts, strict=True))
    merged = reduce(tensor.add, shares)
    return _converted(tensor.asarray(merged, order="C"), dtype.stored), lse


def _differentiate(parts: Sequence[tuple[Any, Any]], dout: Any, dlse: Any = None) -> list[Any]:
    """The gradients of USM arrays, in the dtype of the computation: dout and dlse of every part in turns."""
    compute = parts[0][1].dtype
    dout = _converted(dout, compute)
    weights, _ = _weights([lse for _, lse in parts])
    # rows without any key have weights of 0 / 0
    weights = [_where(lse == -np.inf, 0, weight) for weight, (_, lse) in zip(weights, parts, strict=True)]
    products = []
    for out, lse in parts:
        product = _rows_first(tensor.sum(dout * _converted(out, compute), axis=-1))
        products.append(_where(lse == -np.inf, 0, product))
    mean = reduce(tensor.add, (weight * product for weight, product in zip(weights, products, strict=True)))
    gradients = []
    for weight, product, (_, lse) in zip(weights, products, parts, strict=True):
        through_weight = product - mean if dlse is None else dlse + product - mean
        gradients += [_share(weight, lse, dout), _where(lse == -np.inf, 0, weight * through_weight)]
    return [tensor.asarray(x, order="C") for x in gradients]


def _share(weight: Any, lse: Any, x: Any) -> Any:
    """The share of one part in the average; nothing, whatever `x` holds, where it has seen no key."""
    weight, unseen = (tensor.expand_dims(_rows_first(y), axis=-1) for y in (weight, lse == -np.inf))
    return _where(unseen, 0, weight * x)


def _where(condition: Any, x: float, y: Any) -> Any:
    """`tensor.where`, which in its own choice of order reads outside of arrays with negative strides (dpnp 0.20)."""
    return tensor.where(condition, x, y, order="C")


def _rows_first(x: Any) -> Any:
    """(batch, heads, seq) or (heads, total) in the order of axes of out; and back."""
    return tensor.permute_dims(x, (0, 2, 1) if x.ndim == 3 else (1, 0))


def _converted(x: Any, dtype: str) -> Any:
    """The numbers of a USM array in another dtype, by the conversion that attention has."""
    if x.dtype == dtype:
        return x
    result = empty_like(x, x.shape, dtype)
    packed = x.ndim == 3
    copy_arrays([x[None, ...] if packed else x], [result[None, ...] if packed else result])
    return result
