"""The options of attention, each defined once: its type, default, documentation and check, and which part of it a rank needs.

The signatures and docstrings of the public functions, the agreement of the ranks and what the backends get are made of these
definitions (`definitions`). Options that are arrays are global: they cover all rows and all heads, and every rank passes the
same.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, SupportsIndex, TypedDict

import numpy as np

from ulysses_dp.kernels import score
from ulysses_dp.kernels.launch import Replay

from .._device.arrays import Array, describe, library_of, tensor, to_host
from .._device.dtypes import DTYPES, names
from .._device.remembered import Remembered
from .checks import Geometry, check_array, check_flag, check_integer, shown
from .definitions import Option, options_of
from .layout import PACKED, Layout
from .spans import UNLIMITED, Block, spans, trim

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_SCALE = 1e30  # beyond, the scale itself would overflow float32
Real = float | np.floating[Any] | np.integer[Any]
Window = tuple[SupportsIndex, SupportsIndex] | list[int] | np.ndarray[Any, Any]


class Call(NamedTuple):
    """What the checks of the options know of a call."""

    geometry: Geometry
    layout: Layout
    q: Array | None


def _check_causal(name: str, causal: Any, call: Call) -> bool:
    check_flag(name, causal)
    return bool(causal)


def _check_scale(name: str, scale: Any, call: Call) -> float:
    if scale is None:
        return 1 / math.sqrt(call.geometry.head_dim)
    number = _real(name, scale, " or None")
    size: Any = abs(number)
    if not size < math.inf:
        raise ValueError(f"{name} must be finite, not {shown(scale)}")
    if size > MAX_SCALE:
        raise ValueError(f"{name} must be at most {MAX_SCALE:g} in size, not {shown(scale)}")
    return float(number)


def _check_window(name: str, window_size: Any, call: Call) -> tuple[int, int]:
    pair = window_size.tolist() if isinstance(window_size, np.ndarray) else window_size
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name} must be two integers (left, right), not {shown(window_size)}")
    for n in pair:
        check_integer(name, n)
        if n < -1:
            raise ValueError(f"{name} must be at least 0, or -1 for no limit, not {tuple(pair)}")
    left, right = pair
    return int(left), int(right)


def _check_softcap(name: str, softcap: Any, call: Call) -> float:
    number = _real(name, softcap)
    if number != 0 and not 1 / MAX_SCALE <= number <= MAX_SCALE:
        raise ValueError(f"{name} must be from {1 / MAX_SCALE:g} to {MAX_SCALE:g}, or 0 for none, not {shown(softcap)}")
    return float(number)


def _check_dropout(name: str, dropout_p: Any, call: Call) -> float:
    number = _real(name, dropout_p)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be from 0 to less than 1, not {shown(dropout_p)}")
    return float(number)


def _check_seed(name: str, seed: Any, call: Call) -> int | None:
    if seed is None:
        return None
    check_integer(name, seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} must be from 0 to 2**64 - 1, not {shown(seed)}")
    return int(seed)


def _check_slopes(name: str, slopes: Any, call: Call) -> np.ndarray | None:
    batch, heads = call.geometry.batch, call.geometry.heads
    array = _numbers(name, slopes, (heads,), *([] if call.layout == PACKED else [(batch, heads)]))
    if array is None:
        return None
    if not (abs(array) <= MAX_SCALE).all():
        raise ValueError(f"{name} must be finite and at most {MAX_SCALE:g} in size")
    return array.reshape(-1, heads) if heads else np.empty((1, 0))


def _check_sinks(name: str, sinks: Any, call: Call) -> np.ndarray | None:
    array = _numbers(name, sinks, (call.geometry.heads,))
    if array is not None and not (abs(array[~np.isneginf(array)]) <= MAX_SCALE).all():
        raise ValueError(f"{name} must be finite, or -inf for none, and at most {MAX_SCALE:g} in size")
    return array


def _check_mask(name: str, mask: Any, call: Call) -> np.ndarray | None:
    if mask is None:
        return None
    array = _small_array(name, mask)
    if array.dtype != bool:
        raise TypeError(f"{name} must be bool, not {array.dtype}")
    if array.ndim != 2 or array.shape[0] != call.geometry.batch:
        raise ValueError(f"{name} must be ({call.geometry.batch}, seq_k), one for every key, not {array.shape}")
    return array


def _check_ranges(name: str, ranges: Any, call: Call) -> np.ndarray | None:
    if ranges is None:
        return None
    array, batch = _small_array(name, ranges), call.geometry.batch
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.ndim not in (2, 3) or array.shape[-1] != 2 or array.shape[:-2] not in ((), (batch,)):
        raise ValueError(f"{name} must be (seq_q, 2) or ({batch}, seq_q, 2), the first and the end key, not {array.shape}")
    array = array.astype(np.int64)
    if array.ndim == 3 and (array[:1] == array).all():  # one for all
        array = array[0] if batch else np.zeros(array.shape[1:], np.int64)
    return array


def _check_bias(name: str, bias: Any, call: Call) -> Array | None:
    if bias is None:
        return None
    array = check_array(name, bias)
    if array.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {array.dtype}; supported are {names()}")
    batch, heads, shape = call.geometry.batch, call.geometry.heads, array.shape
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise ValueError(f"{name} must be broadcastable to ({batch}, {heads}, seq_q, seq_k), with 4 axes, not {shape}")
    assert call.q is not None
    if not array.on_host and (call.q.on_host or array.queue() != call.q.queue()):
        raise ValueError(f"{name} must be on the host or on the queue of q, not {array.library.name} elsewhere")
    return array


def check_cu_seqlens(name: str, x: Any, call: Any = None) -> tuple[int, ...] | None:
    """Check where packed sequences start and end; they are not of a call alone."""
    if x is None:
        return None
    array = _small_array(name, x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.ndim != 1 or array.size < 1:
        raise ValueError(f"{name} must have one axis and at least one number, not shape {array.shape}")
    starts = tuple(map(int, array))
    if starts[0] != 0 or any(b < a for a, b in pairwise(starts)):
        raise ValueError(f"{name} must start with 0 and not decrease, not {_shorten(starts)}")
    return starts


def _check_seqused(name: str, x: Any, call: Call) -> tuple[int, ...] | None:
    if x is None:
        return None
    array = _small_array(name, x)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one axis, one number for every sequence, not shape {array.shape}")
    return tuple(map(int, array))


def _as_it_is(name: str, value: Any, call: Call) -> Any:
    """What is checked with the arrays."""
    return value


class FlashAttnOptions(TypedDict, total=False):
    """The options that flash-attn has, too."""

    softmax_scale: Annotated[
        Real | None, Option(None, _check_scale, "float, optional", "Factor of the dot products; 1/sqrt(head_dim) by default.")
    ]
    causal: Annotated[
        bool | np.bool_,
        Option(
            False,
            _check_causal,
            "bool",
            "Query i sees the keys j <= i + seq_k - seq_q: the mask is aligned to the last query and key, as in flash-attn.",
        ),
    ]
    window_size: Annotated[
        Window,
        Option(
            UNLIMITED,
            _check_window,
            "(int, int)",
            "Query i sees the keys from i + seq_k - seq_q - left to i + seq_k - seq_q + right; -1 means no limit. Keys outside "
            "the window take no time.",
        ),
    ]
    softcap: Annotated[
        Real,
        Option(
            0.0, _check_softcap, "float", "If positive, a score s becomes softcap * tanh(s / softcap), before ALiBi and bias."
        ),
    ]
    alibi_slopes: Annotated[
        Any,
        Option(
            None,
            _check_slopes,
            "array or sequence of float, optional",
            r"(heads,) or (batch, heads): slope * \|i + seq_k - seq_q - j\| is subtracted from the score of query i and key j.",
            heads_axis=1,
        ),
    ]
    dropout_p: Annotated[
        Real,
        Option(
            0.0,
            _check_dropout,
            "float",
            "Probability with which a weight is dropped; those that stay are divided by 1 - dropout_p. Which ones are dropped "
            "is a function of seed, batch, head, query and key alone (Philox4x32-10).",
        ),
    ]


class MoreOptions(TypedDict, total=False):
    """The options that `ulysses_flash_attn_func` has besides those of flash-attn."""

    seed: Annotated[
        SupportsIndex | None,
        Option(None, _check_seed, "int, optional", "From 0 to 2**64 - 1; needed if dropout_p is positive."),
    ]
    bias: Annotated[
        Any,
        Option(
            None,
            _check_bias,
            "array, optional",
            "Added to the scores; 4 axes, broadcastable to (batch, heads, seq_q, seq_k), float32, float64, float16 or "
            "bfloat16, on the host or on the queue of q. What it repeats by strides of 0 is not copied. -inf hides a key.",
        ),
    ]
    key_padding_mask: Annotated[
        Any, Option(None, _check_mask, "array of bool, optional", "(batch, seq_k): True for the keys that take part.")
    ]
    key_ranges: Annotated[
        Any,
        Option(
            None,
            _check_ranges,
            "array of int, optional",
            "(seq_q, 2) or (batch, seq_q, 2): the first key that a query sees, and the end of its keys, in numbers of the "
            "whole sequences, from 0 to seq_k; none if the end is not larger. What other masks hide stays hidden. Keys outside "
            "the ranges take no time.",
        ),
    ]
    sinks: Annotated[
        Any,
        Option(
            None,
            _check_sinks,
            "array or sequence of float, optional",
            "(heads,): a logit per head, whose exponential is added to the softmax denominator.",
            heads_axis=0,
        ),
    ]


class PackingOptions(TypedDict, total=False):
    """The options of packed sequences."""

    cu_seqlens_q: Annotated[
        Any,
        Option(
            None,
            check_cu_seqlens,
            "array or sequence of int, optional",
            'With layout "thd": where the packed sequences start, from 0 to the number of rows. Queries of a sequence see keys '
            "of the same sequence only, and `causal`, `window_size` and `alibi_slopes` count within it.",
        ),
    ]
    cu_seqlens_k: Annotated[
        Any,
        Option(
            None, check_cu_seqlens, "array or sequence of int, optional", "The same of the keys; `cu_seqlens_q` by default."
        ),
    ]
    seqused_q: Annotated[
        Any,
        Option(
            None,
            _check_seqused,
            "array or sequence of int, optional",
            'With layout "thd": how many rows of each sequence count, from its start. The others are padding: they see no key, '
            "and the last query, to which masks are aligned, is the last one that counts.",
        ),
    ]
    seqused_k: Annotated[
        Any,
        Option(
            None,
            _check_seqused,
            "array or sequence of int, optional",
            "The same of the keys: nobody sees the others. All count by default.",
        ),
    ]


class LayerOptions(MoreOptions, PackingOptions, total=False):
    """The options that `UlyssesAttention` has besides those of flash-attn."""


class ScoreOptions(FlashAttnOptions, LayerOptions, total=False):
    """All options that say what attention computes."""


class DtypeOptions(TypedDict, total=False):
    """What 16-bit arrays hold."""

    dtype: Annotated[
        str | None,
        Option(
            None,
            _as_it_is,
            "str, optional",
            '"bfloat16" if q, k and v are uint16 arrays that hold bfloat16 numbers; USM arrays have no such dtype.',
        ),
    ]


class CallOptions(DtypeOptions, total=False):
    """What functions by the names of other packages have besides the options of the score."""

    return_max_logit: Annotated[bool, Option(False, _as_it_is, "bool", "Also return the largest score of every head.")]


class AttentionOptions(ScoreOptions, DtypeOptions, total=False):
    """All options of `attention` that say what it computes, and of which arrays."""

    layout: Annotated[
        str | tuple[SupportsIndex, ...],
        Option(
            "bshd",
            _as_it_is,
            '{"bshd", "sbhd", "bhsd", "thd"} or tuple of int',
            "The axes of q, k, v and out: b batch, s seq, h heads, d head_dim; t the rows of all packed sequences, which count "
            "as one batch in bias, key_padding_mask and dropout. A tuple says which axes are batch, seq, heads and head_dim.",
        ),
    ]


OPTIONS = options_of(ScoreOptions)
ALL_MORE = "dlse", "return_max_logit", "bias_grad", "slopes_grad"  # that a call may take or give, if its backend does


@dataclass(frozen=True, eq=False)
class Options:
    """The options of a call, checked."""

    softmax_scale: float
    causal: bool
    return_lse: bool
    layout: Layout
    window_size: tuple[int, int]
    softcap: float
    dropout_p: float
    seed: int | None
    alibi_slopes: np.ndarray | None  # (1 or batch, heads), float64
    sinks: np.ndarray | None  # (heads,), float64
    key_padding_mask: np.ndarray | None  # (1 or batch, seq_k), bool
    bias: Array | None  # 4-D
    cu_seqlens_q: tuple[int, ...] | None
    cu_seqlens_k: tuple[int, ...] | None
    key_ranges: np.ndarray | None = None  # (seq_q, 2) or (batch, seq_q, 2), int64
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    backend: Any = None  # who computes: known to those above, who know the backends
    block: Block | None = None  # what of the sequences is at hand; None: all
    findings: Any = None  # what sees all that is computed, besides

    @cached_property
    def given(self) -> dict[str, Any]:
        """What is not as by default, by name; without the seed where nothing is drawn."""
        values = {name: getattr(self, name) for name in OPTIONS}
        given = {name: value for name, value in values.items() if value is not None and value is not OPTIONS[name].default}
        return {
            name: value
            for name, value in given.items()
            if (OPTIONS[name].default is None or value != OPTIONS[name].default) and (name != "seed" or self.dropout_p)
        }

    @cached_property
    def replay(self) -> Replay:
        """What calls with these options launch: options that are nothing but numbers come back with the next call."""
        return Replay()

    @cached_property
    def remembered(self) -> Remembered:
        """What calls with these options have found out."""
        return Remembered()

    @cached_property
    def more_than_plain(self) -> frozenset[str]:
        """The options that need more than the causal kernel, by name."""
        return frozenset(self.given) - {"softmax_scale", "causal"}

    @property
    def plain(self) -> bool:
        """Whether there is none of them."""
        return not self.more_than_plain

    def for_heads(self, name: str, heads: slice) -> Any:
        """An option as some heads need it."""
        axis, value = OPTIONS[name].heads_axis, getattr(self, name)
        return value if value is None or axis is None else value[(slice(None),) * axis + (heads,)]

    def diagonal(self, seq_q: int, seq_k: int) -> int:
        """Query i of the plain kernel sees the keys up to i + this."""
        return self._block(seq_q, seq_k).diagonal(causal=self.causal)

    def _block(self, seq_q: int, seq_k: int) -> Block:
        return self.block or Block.whole(seq_q, seq_k)

    def of_block(self, block: Block) -> Options:
        """The same for some rows and keys, whose results are merged. A sink counts once, so it is not among them."""
        return replace(self, block=block, sinks=None)

    @cached_property
    def mask(self) -> tuple[tuple[str, Any], ...]:
        """What says which keys a row sees, but for bias and padding: arguments of `spans`."""
        names = "causal", "window_size", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"
        ranges = self.key_ranges
        if ranges is not None and self.differ_by_batch:  # from the first key that a row of any batch sees to the last
            ranges = np.stack([ranges[..., 0].min(axis=0), ranges[..., 1].max(axis=0)], axis=-1)
        return (*((name, getattr(self, name)) for name in names), ("key_ranges", None if ranges is None else ranges.tobytes()))

    @property
    def differ_by_batch(self) -> bool:
        """Whether queries of one row see other keys in other batches, for which kernels have no table."""
        return self.key_ranges is not None and self.key_ranges.ndim == 3

    def by_batch(self) -> Iterator[tuple[slice, Options]]:
        """Every batch, and the options for it, where ranges of keys differ."""
        assert self.key_ranges is not None
        for b in range(len(self.key_ranges)):
            yield slice(b, b + 1), self.of_batch(b)

    def of_batch(self, b: int) -> Options:
        """The options for one batch."""
        one, ranges = slice(b, b + 1), self.key_ranges
        bias, slopes, padding = self.bias, self.alibi_slopes, self.key_padding_mask
        if bias is not None and bias.shape[0] > 1:
            bias = describe(bias.data[one, ...], bias.library)  # array_api_strict wants every axis
        return replace(
            self,
            key_ranges=ranges if ranges is None or ranges.ndim == 2 else ranges[b],
            bias=bias,
            alibi_slopes=slopes if slopes is None or len(slopes) == 1 else slopes[one],
            key_padding_mask=None if padding is None else padding[one],
        )

    def runs(self, seq_q: int, seq_k: int) -> list[tuple[slice, Options]]:
        """Rows among which neither the first key nor the end of the keys decreases, and the options for them.

        The queries of a key follow each other there, as the kernels for gradients expect.
        """
        if self.key_ranges is None:
            return [(slice(None), self)]
        block = self._block(seq_q, seq_k)
        table = block.spans(spans(block.seq_q, block.seq_k, **dict(self.mask)))
        (drops,) = np.nonzero((np.diff(table[:, :2], axis=0) < 0).any(axis=1))
        if not drops.size:
            return [(slice(None), self)]
        ends = [0, *(drops + 1).tolist(), seq_q]
        return [
            (slice(first, end), replace(self, block=replace(block, rows=block.rows.cut(first, end))))
            for first, end in pairwise(ends)
        ]

    def common(self) -> dict[str, str]:
        """What must be the same on all ranks, as text by name. Of the bias, which may be large, its shape and dtype."""
        texts = {}
        for field in fields(self):
            if field.name == "findings":
                continue
            value = getattr(self, field.name)
            name = {"backend": "attn_type"}.get(field.name, field.name)
            if name == "layout" and not isinstance(value, str):
                name = "axes"  # `UlyssesAttention` has them from scatter_idx and gather_idx
            if name == "bias" and value is not None:
                texts[name] = f"{value.shape} {value.dtype}"
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
        ranges = self.key_ranges
        if ranges is not None:
            if ranges.shape[-2] != seq_q:
                raise ValueError(f"{function}: key_ranges must be ({seq_q}, 2), one for every query, not {ranges.shape}")
            if ranges.size and (ranges.min() < 0 or ranges.max() > seq_k):
                came = f"{ranges.min()} to {ranges.max()}"
                raise ValueError(f"{function}: key_ranges must be from 0 to the {seq_k} keys of all ranks, not {came}")
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

    def score_options(self, q: Any, seq_k: int, first_head: int, dtype: Any = None) -> score.ScoreOptions | None:
        """The options for the heads of USM array q, the first of which has this number; None where the plain kernel will do.

        The bias is of this dtype, that of q by default.
        """
        return None if self.plain else self.all_score_options(q, seq_k, first_head, dtype)

    def all_score_options(self, q: Any, seq_k: int, first_head: int, dtype: Any = None) -> score.ScoreOptions:
        """The same, with spans for a plain kernel, too."""
        batch, seq_q, heads, _ = q.shape
        mine = slice(first_head, first_head + heads)
        block = self._block(seq_q, seq_k)
        table = block.spans(spans(block.seq_q, block.seq_k, **dict(self.mask)))
        padding = None if self.key_padding_mask is None else self.key_padding_mask[:, block.keys.slice]
        if padding is not None:
            table = trim(table, np.any(padding, axis=0))
        bias = None if self.bias is None else self.local_bias(q, mine, dtype or q.dtype)
        return score.ScoreOptions(
            spans=table,
            softcap=self.softcap,
            slopes=self.for_heads("alibi_slopes", mine),
            sinks=self.for_heads("sinks", mine),
            bias=None if bias is None else tensor.broadcast_to(bias, (batch, heads, seq_q, seq_k)),
            padding=padding,
            dropout_p=self.dropout_p,
            seed=self.seed or 0,
            first_head=first_head,
            first_row=block.rows.start,
            first_key=block.keys.start,
            step=block.rows.step,
        )

    def local_bias(self, q: Any, heads: slice, dtype: Any) -> Any:
        """The bias of some heads as a USM array on the queue of q; what strides of 0 repeat is there once."""
        assert self.bias is not None
        x = self.bias.numpy() if self.bias.on_host else self.bias.usm()
        x = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]
        if x.shape[1] > 1:
            x = x[:, heads]
        if self.block is not None:
            for axis, of_axis in ((2, self.block.rows), (3, self.block.keys)):
                if x.shape[axis] > 1:
                    x = x[(slice(None),) * axis + (of_axis.slice,)]
        if self.bias.dtype == "bfloat16":
            x = _bfloat16_to_float32(x if self.bias.on_host else to_host(x))
        if isinstance(x, np.ndarray):
            x = np.ascontiguousarray(x)  # strides may be no multiples of the itemsize
        return tensor.asarray(_in_range(x, dtype), dtype=dtype, sycl_queue=q.sycl_queue)


def check_options(
    geometry: Geometry,
    q: Array | None,
    layout: Layout,
    options: Mapping[str, Any],
    *,
    return_lse: Any,
    return_lse_name: str = "return_lse",
) -> Options:
    """Check the options, as far as that goes without the rows of the other ranks; the defaults are filled in."""
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}; there are {', '.join(options_of(AttentionOptions))}")
    check_flag(return_lse_name, return_lse)
    call = Call(geometry, layout, q)
    checked = {name: option.check(name, options.get(name, option.default), call) for name, option in OPTIONS.items()}
    if checked["dropout_p"] > 0 and checked["seed"] is None:
        given = shown(options["dropout_p"])
        raise ValueError(f"seed must be given with dropout_p = {given}: all ranks have to draw the same numbers")
    if checked["window_size"] == (-1, 0):  # the plain kernel has that, too
        checked |= {"causal": True, "window_size": UNLIMITED}
    checked["cu_seqlens_k"] = _check_packing(layout, checked["cu_seqlens_q"], checked["cu_seqlens_k"])
    for x in "qk":
        _check_used(f"seqused_{x}", checked[f"seqused_{x}"], checked[f"cu_seqlens_{x}"], layout)
    result = Options(**checked, layout=layout, return_lse=bool(return_lse))
    if result.dropout_p > 0 and result.differ_by_batch:  # kernels count batches for their random numbers
        raise NotImplementedError("key_ranges that differ between batches are not supported with dropout_p; (seq_q, 2) are")
    return result


def _check_packing(layout: Layout, starts_q: tuple[int, ...] | None, starts_k: tuple[int, ...] | None) -> Any:
    """Check that packed sequences and their layout go together; returns where those of the keys start."""
    if layout != PACKED:
        if starts_q is not None or starts_k is not None:
            name = "cu_seqlens_k" if starts_q is None else "cu_seqlens_q"
            raise ValueError(f"{name} is for layout 'thd', not {layout!r}")
        return None
    if starts_q is None:
        raise ValueError("cu_seqlens_q must be given with layout 'thd'")
    if starts_k is None:
        return starts_q
    if len(starts_k) != len(starts_q):
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have the same length, not {len(starts_q)} and {len(starts_k)}")
    return starts_k


def _check_used(name: str, used: tuple[int, ...] | None, starts: tuple[int, ...] | None, layout: Layout) -> None:
    """Check how many rows of packed sequences count, against how many there are."""
    if used is None:
        return
    if starts is None:
        raise ValueError(f"{name} is for layout 'thd', not {layout!r}")
    lengths = tuple(b - a for a, b in pairwise(starts))
    if len(used) != len(lengths):
        raise ValueError(f"{name} must have {len(lengths)} numbers, one for every sequence, not {len(used)}")
    if not all(0 <= n <= length for n, length in zip(used, lengths, strict=True)):
        raise ValueError(f"{name} must be from 0 to the rows of each sequence, {_shorten(lengths)}, not {_shorten(used)}")


def _real(name: str, x: Any, alternative: str = "") -> Any:
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        hint = "; by position, alibi_slopes come after it, as in flash-attn" if name == "softcap" else ""
        raise TypeError(f"{name} must be a real number{alternative}, not {type(x).__name__}{hint}")
    return float(x) if isinstance(x, np.generic) else x  # limits are beyond the range of np.float16


def _small_array(name: str, x: Any) -> np.ndarray:
    """A small array of any kind, or a sequence of numbers, on the host; what bfloat16 numbers are, in float32."""
    if library_of(x) is not None:
        array = check_array(name, x)
        return _bfloat16_to_float32(array.numpy()) if array.dtype == "bfloat16" else array.numpy()
    if not isinstance(x, list | tuple):
        raise TypeError(f"{name} must be an array or a sequence, not {type(x).__module__}.{type(x).__qualname__}")
    try:
        return np.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array or a sequence of numbers, but {error}") from error


def _bfloat16_to_float32(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _in_range(x: Any, dtype: Any) -> Any:
    """A bias of a wider dtype with no finite number beyond the range of `dtype`: only -inf hides a key."""
    if x.dtype.itemsize <= np.dtype(dtype).itemsize:
        return x
    library, limits = np if isinstance(x, np.ndarray) else tensor, np.finfo(dtype)
    return library.where(library.isinf(x), x, library.clip(x, float(limits.min), float(limits.max)))


def _numbers(name: str, x: Any, *shapes: tuple[int, ...]) -> np.ndarray | None:
    """Real numbers in an array of one of these shapes, as float64."""
    if x is None:
        return None
    array = _small_array(name, x)
    if array.dtype.kind not in "fi":
        raise TypeError(f"{name} must be real numbers, not {array.dtype}")
    if array.shape not in shapes:
        expected = " or ".join(f"{shape}" for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must have shape {expected}, one for every head, not {array.shape}")
    return array.astype(np.float64)


def _shorten(numbers: tuple[int, ...]) -> str:
    return f"{numbers}" if len(numbers) <= 8 else f"({', '.join(map(str, numbers[:8]))}, …)"


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()
