"""A call of attention compared with the oracle: any layout, dtype, kind of array, and set of options."""

import re

import numpy as np
import oracle
import pytest
from helpers import as_kind, as_numpy, as_view, assert_like, outcomes, part, split

from ulysses_dp import attention, ulysses_attention
from ulysses_dp._device.queue import default_queue

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

# the order of the axes of a (batch, seq, heads, head_dim) array; each is its own inverse
AXES = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}
# how numbers are given: by the name of a dtype, or "bits" for bfloat16 as uint16
FORMS = ("float32", "float64", "float16", "bits", *(["bfloat16"] if ml_dtypes else []))
OPTIONS = ("causal", "window", "softcap", "alibi", "bias", "mask", "sinks", "dropout")


def local(q, k, v, _comm, **options):
    """`attention` with the arguments of `distributed`."""
    return attention(q, k, v, **options)


def distributed(q, k, v, comm, **options):
    """`ulysses_attention` with the arguments of `local`."""
    return ulysses_attention(q, k, v, comm=comm, **options)


BOTH = {"params": [pytest.param(local, marks=pytest.mark.single), distributed], "ids": ["local", "distributed"]}


def kinds_of(form):
    """The kinds of arrays that can hold a form: SYCL knows no bfloat16 arrays, and not every device knows float16."""
    on_device = {"bfloat16": False, "float16": default_queue().sycl_device.has_aspect_fp16}
    return ("numpy", "dpnp", "usm") if on_device.get(form, True) else ("numpy",)


def encode(x, form):
    """Numbers as a user gives them, rounded to what the form holds."""
    if form == "bits":
        return oracle.to_bfloat16(x)
    return np.asarray(x).astype(ml_dtypes.bfloat16 if form == "bfloat16" else form)


def decode(x):
    """The numbers that an array holds."""
    x = as_numpy(x)
    return oracle.from_bfloat16(x) if x.dtype == np.uint16 else x.astype(np.float64)


def dtype_option(form):
    """Bit patterns do not say what they are."""
    return {"dtype": "bfloat16"} if form == "bits" else {}


def dtype_of_options(form):
    """The dtype of slopes, biases and sinks that goes with a form of q, k and v."""
    return "float64" if form == "float64" else "float32"


def is_array(x):
    """Whether an option is an array of any kind; the numbers of NumPy are none."""
    return hasattr(x, "shape") and not isinstance(x, np.generic)


def some_options(names, batch, heads, seq, seq_k, seed=0, dtype="float32"):
    """Keyword arguments for options by name, with random contents for all rows and heads."""
    rng = np.random.default_rng(seed)
    options = {
        "causal": {"causal": True},
        "window": {"window_size": (7, 3)},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": (rng.random(heads) - 0.3).astype(dtype)},
        "alibi of batch": {"alibi_slopes": (rng.random((batch, heads)) - 0.3).astype(dtype)},
        "bias": {"bias": hiding(rng.standard_normal((batch, heads, seq, seq_k)), rng).astype(dtype)},
        "mask": {"key_padding_mask": rng.random((batch, seq_k)) < 0.7},
        "sinks": {"sinks": rng.standard_normal(heads).astype(dtype)},
        "dropout": {"dropout_p": 0.25, "seed": 2**63 + 5},
    }
    return {name: value for option in names for name, value in options[option].items()}


def hiding(bias, rng):
    """A bias that also hides a few keys."""
    return np.where(rng.random(bias.shape) < 0.1, -np.inf, bias)


def assert_close(result, expected, form):
    """Equal within the tolerance of the form, relative to the largest number."""
    finite = np.abs(expected[np.isfinite(expected)])
    atol = oracle.TOLERANCE["bfloat16" if form == "bits" else form] * finite.max(initial=1)
    np.testing.assert_allclose(decode(result), expected, rtol=0, atol=atol)


def check(
    comm,
    whole,
    *,
    rows=None,
    rows_k=None,
    layout="bshd",
    form="float32",
    kind="numpy",
    strides="C",
    function=distributed,
    attn_type=None,
    exchange=None,
    return_lse=True,
    **options,
):
    """Every rank passes its rows of the whole q, k and v and all of the options, and gets its rows of the oracle's result.

    The whole arrays are (batch, seq, heads, head_dim) numbers for any layout, or (total, heads, head_dim) for "thd".
    """
    packed = layout == "thd"
    axis, axes = (0, (0, 1, 2)) if packed else (1, AXES[layout])
    rows = split(whole[0].shape[axis], comm.size) if rows is None else rows
    rows_k = split(whole[1].shape[axis], comm.size) if rows_k is None else rows_k
    stored = [encode(x, form) for x in whole]
    mine = [part(x, n, comm.rank, axis).transpose(axes) for x, n in zip(stored, (rows, rows_k, rows_k), strict=True)]
    mine = [as_view(x[None], kind, strides)[0] if packed else as_view(x, kind, strides) for x in mine]
    given = {name: as_kind(x, kind) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    arrays = [*mine, *(x for x in given.values() if is_array(x))]
    before = [np.array(as_numpy(x)) for x in arrays]
    how = {"layout": layout, "attn_type": attn_type, "exchange": exchange}
    how = {name: value for name, value in how.items() if value is not None} | dtype_option(form)
    results = function(*mine, comm, return_lse=return_lse, **how, **given)
    out, lse = results if return_lse else (results, None)

    on_host = {name: as_numpy(x) if is_array(x) else x for name, x in options.items()}
    expected = oracle.dense_attention(*map(decode, stored), **on_host)
    expected_out, expected_lse = part(expected[0], rows, comm.rank, axis), part(expected[1], rows, comm.rank, axis=2 - packed)
    assert_like(out, mine[0], expected_out.transpose(axes).shape, c_contiguous=False)
    assert_close(out, expected_out.transpose(axes), form)
    if return_lse:
        assert type(lse) is type(out)
        assert tuple(lse.shape) == expected_lse.shape
        lse_form = "float64" if form == "float64" else "float32"
        assert lse.dtype == lse_form
        assert_close(lse, expected_lse, lse_form)
    for x, unchanged in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(decode(x), decode(unchanged))
    return as_numpy(out)


def assert_refused(comm, name, bad, good, call):
    """`bad` on all ranks, then on the last one alone: one error everywhere, which names the argument; then `good` works."""
    last = comm.size - 1
    for ranks in dict.fromkeys((range(comm.size), range(last, comm.size))):
        results = outcomes(comm, lambda ranks=ranks: call(bad if comm.rank in ranks else good))
        assert len(set(results)) == 1, results
        assert results[0] is not None, f"no error from {bad}"
        error, message = results[0]
        assert error in (TypeError, ValueError, NotImplementedError), results[0]
        assert re.search(rf"\b{name}", message), message
    assert outcomes(comm, lambda: call(good)) == [None] * comm.size


def assert_disagree(comm, name, this, others, call):
    """`this` on the last rank and `others` on the rest: one ValueError everywhere, which names the argument; then `others`."""
    results = outcomes(comm, lambda: call(this if comm.rank == comm.size - 1 else others))
    assert len(set(results)) == 1, results
    assert results[0] is not None, "nothing was raised"
    error, message = results[0]
    assert error is ValueError, message
    assert re.search(rf"\b{name}", message), message
    assert outcomes(comm, lambda: call(others)) == [None] * comm.size


def made(options, n):
    """Options of which some depend on the number of rows of all ranks."""
    return {name: value(n) if callable(value) else value for name, value in options.items()}


def described(value):
    """An id for options, which does not print arrays."""
    if isinstance(value, dict):
        return " ".join(f"{name}={described(x)}" for name, x in value.items() if name not in ("q", "k", "v")) or "none"
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name}{list(value.shape)}"
    return "made" if callable(value) else str(value)
