"""Calls of attention and of its gradient compared with their oracles: any layout, dtype, kind of array, and set of options."""

import re
from collections.abc import Callable
from typing import NamedTuple

import gradients
import numpy as np
import oracle
from helpers import COMPLETE, LAYOUTS, SPLITS, WORLD, as_kind, as_numpy, as_view, assert_like, outcomes, part, random_qkv, split
from hypothesis import strategies as st

from ulysses_dp import attention, attention_backward, ulysses_attention, ulysses_attention_backward
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
COMBINATIONS = [
    ("causal", "window", "alibi", "sinks"),
    ("softcap", "alibi of batch", "bias", "mask"),
    ("causal", "mask", "sinks", "dropout"),
    OPTIONS,
]
DROPOUT = {"dropout_p": 0.1, "seed": 1}


class Functions(NamedTuple):
    """What is tested: attention, and its gradient, which needs the results of attention."""

    forward: Callable
    gradient: Callable


def _forward_alone(q, k, v, _comm, **options):
    return attention(q, k, v, **options)


def _gradient_alone(q, k, v, dout, _comm, *, context=False, restride=lambda x: x, dlse=None, **options):
    assert not context
    out, lse = attention(q, k, v, return_lse=True, **options)
    return attention_backward(dout, q, k, v, restride(out), lse, dlse=dlse, **options)


def _forward(q, k, v, comm, **options):
    return ulysses_attention(q, k, v, comm=comm, **options)


def _gradient(q, k, v, dout, comm, *, context=False, restride=lambda x: x, dlse=None, **options):
    out, lse, *ctx = ulysses_attention(q, k, v, comm=comm, return_lse=True, return_ctx=context, **options)
    ctx = {"ctx": ctx[0]} if context else {}
    return ulysses_attention_backward(dout, q, k, v, restride(out), lse, dlse=dlse, comm=comm, **ctx, **options)


local = Functions(_forward_alone, _gradient_alone)  # with the arguments of the others
distributed = Functions(_forward, _gradient)


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
    """The dtype of lse, and of slopes, biases and sinks, that goes with a form of q, k and v."""
    return "float64" if form == "float64" else "float32"


def is_array(x):
    """Whether an option is an array of any kind; the numbers of NumPy are none."""
    return hasattr(x, "shape") and not isinstance(x, np.generic)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


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


def offsets(lengths, dtype=np.int32):
    """Where sequences of these lengths start, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


def packed(lengths, heads=4, kv_heads=2, head_dim=16, dtype="float32", seed=0):
    """Whole packed q, k and v, and the options that say so."""
    rows, keys = lengths
    whole = random_qkv(seed, 1, sum(rows), heads, kv_heads, head_dim, dtype, sum(keys))
    options = {"layout": "thd", "cu_seqlens_q": offsets(rows), "cu_seqlens_k": offsets(keys)}
    return tuple(x[0] for x in whole), options


def random_dout(q, seed=99, width=None):
    """What comes from the loss, the same on every rank."""
    return np.random.default_rng(seed).standard_normal((*q.shape[:-1], width or q.shape[-1]))


# ---- what is drawn by hypothesis


def drawn_names(draw, *, packed=False):
    """Names of options; windows are drawn with the rest of a call, and packed sequences have no slopes of batches."""
    names = draw(st.sets(st.sampled_from([name for name in OPTIONS if name != "window"])))
    of_batch = "alibi" in names and not packed and draw(st.booleans())
    return names - {"alibi"} | {"alibi of batch"} if of_batch else names


def drawn_options(draw, names, shape, seed, dtype):
    """The options of these names for (batch, heads, seq, seq_k); a bias may be broadcast."""
    options = some_options(sorted(names), *shape, seed, dtype)
    if "bias" in names:
        options["bias"] = options["bias"][tuple(slice(draw(st.sampled_from([1, None]))) for _ in range(4))]
    if "dropout" in names:
        options |= {"dropout_p": draw(st.sampled_from([0.1, 0.5])), "seed": draw(st.integers(0, 2**64 - 1))}
    return options


def drawn_call(draw, form, seq, seq_k):
    """How so many rows and keys are passed, and by what they are computed."""
    edges, hows = st.sampled_from([-1, 0, 1, 3, 5, 17, 100]), st.sampled_from(SPLITS)
    return {
        "rows": split(seq, WORLD.size, draw(hows)),
        "rows_k": split(seq_k, WORLD.size, draw(hows)),
        "window_size": (draw(edges), draw(edges)),
        "softmax_scale": draw(st.sampled_from([None, 0.2])),
        "form": form,
        "kind": draw(st.sampled_from(kinds_of(form))),
        # the gaps of other strides are filled with nan, which bit patterns have no room for
        "strides": draw(st.sampled_from(("C", "swapped", "reversed") if form == "bits" else LAYOUTS)),
        "exchange": draw(st.sampled_from(["auto", "device", "host"])),
        "attn_type": draw(st.sampled_from(COMPLETE)),
    }


# ---- the comparison with the oracles


class Passed:
    """What this rank passes of whole arrays, and all of the options; and what an oracle is asked instead.

    The whole arrays, q, k, v and perhaps dout, are (batch, seq, heads, head_dim) numbers for any layout, or
    (total, heads, head_dim) for "thd".
    """

    def __init__(
        self,
        comm,
        whole,
        *,
        rows=None,
        rows_k=None,
        layout="bshd",
        form="float32",
        kind="numpy",
        strides="C",
        attn_type=None,
        exchange=None,
        dlse=None,
        **options,
    ):
        self._packed = layout == "thd"
        self._comm, self._rank, self._form, self._kind, self._strides = comm, comm.rank, form, kind, strides
        self._axis, self._axes = (0, (0, 1, 2)) if self._packed else (1, AXES[layout])
        rows = split(whole[0].shape[self._axis], comm.size) if rows is None else rows
        rows_k = split(whole[1].shape[self._axis], comm.size) if rows_k is None else rows_k
        self._counts = rows, rows_k, rows_k, rows
        stored = [encode(x, form) for x in whole]
        self.numbers = [decode(x) for x in stored]
        self.arrays = [self._view(self._part(x, of).transpose(self._axes)) for of, x in enumerate(stored)]
        how = {"layout": layout, "attn_type": attn_type, "exchange": exchange}
        how = {name: value for name, value in how.items() if value is not None} | dtype_option(form)
        given = {name: as_kind(x, kind) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        if dlse is not None:
            given["dlse"] = as_kind(self._part_of_lse(dlse), kind)
            options |= {"dlse": dlse}
        self.options = how | given
        self.options_of_oracle = {name: as_numpy(x) if is_array(x) else x for name, x in options.items()}
        self._all = [*self.arrays, *(x for x in given.values() if is_array(x))]
        self._before = [np.array(as_numpy(x)) for x in self._all]

    def restride(self, result):
        """A result seen through the strides of what is passed."""
        return result if self._strides == "C" else self._view(as_numpy(result))

    def assert_rows(self, result, expected, of, tolerance):
        """A result is like an array that was passed, and has this rank's part of the expected numbers."""
        expected = self._part(expected, of).transpose(self._axes)
        assert_like(result, self.arrays[of], expected.shape, c_contiguous=False)
        assert_close(result, expected, self._form, tolerance)

    def assert_lse(self, lse, expected):
        """lse of this rank's rows."""
        expected = self._part_of_lse(expected)
        self._assert_in_dtype_of_options(lse, expected.shape)
        assert_close(lse, expected, dtype_of_options(self._form))

    def assert_dsinks(self, dsinks, expected):
        """The gradient of the sinks is bit by bit the same on all ranks."""
        self._assert_in_dtype_of_options(dsinks, expected.shape)
        for theirs in self._comm.allgather(as_numpy(dsinks)):
            np.testing.assert_array_equal(as_numpy(dsinks), theirs)
        # out, of which dsinks are a sum over all rows, comes rounded to the form; dsinks do not
        assert_close(dsinks, expected, self._form, gradients.TOLERANCE)

    def assert_unchanged(self):
        """What was passed is as it was."""
        for x, unchanged in zip(self._all, self._before, strict=True):
            np.testing.assert_array_equal(decode(x), decode(unchanged))

    def _assert_in_dtype_of_options(self, result, shape):
        like = self.arrays[0]
        assert type(result) is type(like)
        assert getattr(result, "sycl_queue", None) == getattr(like, "sycl_queue", None)
        assert tuple(result.shape) == shape
        assert as_numpy(result).dtype == dtype_of_options(self._form)

    def _part(self, x, of):
        return part(x, self._counts[of], self._rank, self._axis)

    def _part_of_lse(self, x):
        return part(x, self._counts[0], self._rank, axis=1 if self._packed else 2)

    def _view(self, x):
        return as_view(x[None], self._kind, self._strides)[0] if self._packed else as_view(x, self._kind, self._strides)


def assert_close(result, expected, form, tolerance=oracle.TOLERANCE):
    """Equal within the tolerance of the form, relative to the largest number, or to 1 where that is larger."""
    atol = tolerance["bfloat16" if form == "bits" else form] * np.abs(expected[np.isfinite(expected)]).max(initial=1)
    np.testing.assert_allclose(decode(result), expected, rtol=0, atol=atol)


def check(comm, whole, *, functions=distributed, return_lse=True, **how):
    """Every rank passes its rows of the whole q, k and v, as `Passed` says, and gets its rows of the oracle's result."""
    passed = Passed(comm, whole, **how)
    results = functions.forward(*passed.arrays, comm, return_lse=return_lse, **passed.options)
    out, lse = results if return_lse else (results, None)
    expected, expected_lse = oracle.dense_attention(*passed.numbers, **passed.options_of_oracle)
    passed.assert_rows(out, expected, 0, oracle.TOLERANCE)
    if return_lse:
        passed.assert_lse(lse, expected_lse)
    passed.assert_unchanged()
    return as_numpy(out)


def check_gradient(comm, whole, *, functions=distributed, dout=None, context=False, **how):
    """Every rank passes its rows of the whole q, k, v and dout, and perhaps dlse, and gets its rows of the dense gradient."""
    passed = Passed(comm, (*whole, random_dout(whole[0], width=whole[2].shape[-1]) if dout is None else dout), **how)
    results = functions.gradient(*passed.arrays, comm, context=context, restride=passed.restride, **passed.options)
    *numbers, dout = passed.numbers
    *expected, expected_dsinks = gradients.dense_gradient(dout, *numbers, **passed.options_of_oracle)
    assert len(results) == (3 if how.get("sinks") is None else 4)
    for of, (result, whole_gradient) in enumerate(zip(results[:3], expected, strict=True)):
        passed.assert_rows(result, whole_gradient, of, gradients.TOLERANCE)
    for dsinks in results[3:]:
        passed.assert_dsinks(dsinks, expected_dsinks)
    passed.assert_unchanged()
    return [as_numpy(x) for x in results]


# ---- bad arguments


def call_on(comm, function, arrays):
    """A function of options, which may replace the arrays of this rank; without a communicator if that is None."""
    how = {} if comm is None else {"comm": comm}

    def call(options):
        values = arrays | options
        mine = [values.pop(name) for name in arrays]
        return function(*mine, **how, **values)

    return call


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
