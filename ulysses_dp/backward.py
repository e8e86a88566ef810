"""The gradient of attention, on one rank and over a sequence that is split over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ._call.checks import Geometry, check_exchange, check_kind, check_node_size, check_overlap, check_places
from ._call.layout import PACKED, from_bshd, to_bshd
from ._call.options import Options, check_attention
from ._device.arrays import dtype_of, from_usm, kind_of, tensor, to_usm
from ._device.copies import copy_arrays
from ._device.trace import call, stage
from ._device.workspace import empty_like, scratch
from ._local import empty_out
from ._ranks import mpi
from ._ranks.agree import Checked, Course, agree
from ._ranks.partition import HeadMap, Heads, column, kv_heads_are_shared, kv_shares, part_heads, query_shares, share_heads
from ._ranks.redistribution import Redistribution, pipeline
from .attention import Context, as_columns
from .backends import AttnType, LocalAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._ranks.partition import Share


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    /,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    bias: Any = None,
    key_padding_mask: Any = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    attn_type: LocalAttention = AttnType.INTEL_SYCL,
) -> Any:
    """Gradient of `attention`: the vector-Jacobian product for a cotangent of its result.

    Not collective. Returns when the results are complete. Memory does not grow with seq_q x seq_k.

    Parameters
    ----------
    dout : same kind, dtype, device and shape as q
        Cotangent of the result: the gradient of a loss with respect to it.
    q, k, v : arrays
        What `attention` was given.
    out, lse : arrays
        What `attention` returned with ``return_lse=True``.
    softmax_scale, causal, window_size, softcap, alibi_slopes, bias, key_padding_mask, sinks, cu_seqlens_q, cu_seqlens_k
        What `attention` was given. `alibi_slopes` and `bias` get no gradient.
    dropout_p, seed, layout, dtype, attn_type
        What `attention` was given.

    Returns
    -------
    dq, dk, dv : arrays
        Gradients, of the kind, dtype, device and shape of q, k and v.
    dsinks : array
        Only if `sinks` is given: its gradient, (heads,), of the kind of q and the dtype of lse.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ImportError
        As `attention` does; and if dout, out or lse do not fit q.

    See Also
    --------
    attention : the forward pass.

    Notes
    -----
    The weights are computed again from lse (Dao, arXiv:2307.08691). Every sum has a fixed order: repeating a call gives the
    same bits. 16-bit arrays are computed in float32, in copies.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import attention, attention_backward
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 1, 5, 2, 8))
    >>> out, lse = attention(q, k, v, return_lse=True)
    >>> dq, dk, dv = attention_backward(dout, q, k, v, out, lse)
    >>> moved = attention(q, k, v + 1e-3 * dout)  # attention is linear in v
    >>> bool(np.isclose(((moved - out) * dout).sum(), 1e-3 * (dv * dout).sum()))
    True
    """
    # Validate inputs.
    views, geometry, options = _check(
        *(dout, q, k, v, out, lse),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        bias=bias,
        key_padding_mask=key_padding_mask,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_p=dropout_p,
        seed=seed,
        layout=layout,
        dtype=dtype,
        attn_type=attn_type,
    )
    options.check_lengths("attention_backward", views[1].shape[1], views[2].shape[1])
    # Delegate.
    with call("attention_backward"):
        grads, dsinks = _differentiate_whole([to_usm(x) for x in views], geometry, options)
        return _to_user(grads, dsinks, options, q)


def ulysses_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    /,
    *,
    comm: Any = None,
    ctx: Context | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    bias: Any = None,
    key_padding_mask: Any = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bshd",
    dtype: str | None = None,
    attn_type: LocalAttention = AttnType.INTEL_SYCL,
    exchange: str = "auto",
    overlap: int | str = "auto",
    node_size: int | str = 1,
) -> Any:
    """Gradient of `ulysses_attention`, for the rows of this rank.

    Collective over `comm`. One all-to-all brings what the heads of a rank need, one brings dq, dk and dv back. Returns when the
    results are complete.

    Parameters
    ----------
    dout : same kind, dtype, device and shape as q
        Cotangent of the result: the gradient of a loss, the same one on all ranks, with respect to the rows of this rank.
    q, k, v : arrays
        What `ulysses_attention` was given.
    out, lse : arrays
        What `ulysses_attention` returned with ``return_lse=True``.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    ctx : Context, optional
        What `ulysses_attention` returned with ``return_ctx=True``: then q, k, v and lse are not sent again.
    softmax_scale, causal, window_size, softcap, alibi_slopes, bias, key_padding_mask, sinks, cu_seqlens_q, cu_seqlens_k
        What `ulysses_attention` was given. `alibi_slopes` and `bias` get no gradient.
    dropout_p, seed, layout, dtype, attn_type, exchange, overlap, node_size
        What `ulysses_attention` was given.

    Returns
    -------
    dq, dk, dv : arrays
        Gradients, of the kind, dtype, device and shape of q, k and v.
    dsinks : array
        Only if `sinks` is given: its gradient, (heads,), the same on all ranks, of the kind of q and the dtype of lse.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ImportError
        On all ranks, as `ulysses_attention` does; and if on any rank dout, out, lse or ctx do not fit q.

    See Also
    --------
    ulysses_attention : the forward pass.

    Notes
    -----
    If P divides seq and kv_heads, each rank sends ``(P-1)/P² · batch · seq · itemsize`` times
    ``2 (heads + kv_heads) head_dim + 2 heads`` bytes for the way there, or ``heads (head_dim + 1)`` with `ctx`, and
    ``(heads + 2 kv_heads) head_dim`` for the way back; of 16-bit arrays, the single numbers per head count twice. A kv head
    that several ranks read is summed over them in rank order, which for 16-bit arrays is done, and sent, in float32.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import ulysses_attention, ulysses_attention_backward
    >>> q = np.ones((1, 16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> out, lse, ctx = ulysses_attention(q, q, q, causal=True, return_lse=True, return_ctx=True)
    >>> dq, dk, dv = ulysses_attention_backward(out, q, q, q, out, lse, ctx=ctx, causal=True)
    >>> dq.shape
    (1, 16, 4, 8)
    """
    function = "ulysses_attention_backward"
    comm = mpi.resolve_comm(function, comm)

    # Validate inputs.
    def check() -> Checked[tuple[list[Any], Geometry, Options]]:
        views, geometry, options = _check(
            *(dout, q, k, v, out, lse),
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            bias=bias,
            key_padding_mask=key_padding_mask,
            sinks=sinks,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            dropout_p=dropout_p,
            seed=seed,
            layout=layout,
            dtype=dtype,
            attn_type=attn_type,
        )
        check_exchange(exchange)
        rows = views[1].shape[1], views[2].shape[1]
        _check_context(ctx, geometry, comm, rows)
        common = {
            "ctx": f"of {len(ctx.parts)} parts" if ctx else "not given",
            "overlap": check_overlap(overlap),
            "node_size": check_node_size(node_size, comm.size),
            **vars(geometry),
            **options.common(),
        }
        arrays = [to_usm(x) for x in views]
        return Checked(rows, common, (arrays, geometry, options), (arrays[0].sycl_queue, exchange))

    with call(function):
        agreement = agree(comm, function, check)
        arrays, geometry, options = agreement.result
        q_rows, k_rows = column(agreement.sizes, 0), column(agreement.sizes, 1)
        options.check_lengths(function, sum(q_rows), sum(k_rows))
        # Delegate.
        if comm.size == 1:
            grads, dsinks = _differentiate_whole(arrays, geometry, options)
        else:
            course, route = Course(comm, function), mpi.choose_route(arrays[0].sycl_queue, exchange)
            heads = share_heads(geometry.heads, geometry.kv_heads, comm.size)
            # the sums of a kv head that several ranks read have the order of the ranks: they stay together
            shared = kv_heads_are_shared(heads)
            wanted = len(ctx.parts) if ctx else 1 if shared else check_overlap(overlap)
            shares = part_heads(heads, geometry.group, wanted)
            wire = mpi.wire(comm, route, node_size, blocking=len(shares) == 1)
            path = _Path(course, wire, arrays, q_rows, k_rows, geometry, options, shared)
            parts = course.prepare(agreement, lambda: [_Part(path, ctx, *x) for x in enumerate(shares)])
            course.run(path.start)
            pipeline(parts)
            grads, dsinks = course.run(path.finish) or ([], None)
            course.confirm()
            if options.sinks is not None:
                dsinks = tensor.asarray(mpi.join(comm, dsinks), sycl_queue=arrays[0].sycl_queue)
        return _to_user(grads, dsinks, options, q)


def _check(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *, layout: Any, dtype: Any, **options: Any
) -> tuple[tuple[Any, ...], Geometry, Options]:
    """Check all arguments; returns dout, q, k, v, out as views (batch, seq, heads, head_dim), and lse (batch, heads, seq)."""
    views, geometry, settings = check_attention(q, k, v, layout=layout, dtype=dtype, return_lse=True, backward=True, **options)
    of_q = dtype_of(q), tuple(q.shape)
    rows = (geometry.heads, views[0].shape[1])
    of_lse = geometry.compute_dtype, rows if layout == PACKED else (geometry.batch, *rows)
    for name, x, (expected_dtype, expected) in (("dout", dout, of_q), ("out", out, of_q), ("lse", lse, of_lse)):
        kind = check_kind(name, x)
        if kind is not kind_of(q):
            raise TypeError(f"{name} must be of the kind of q, {type(q).__qualname__}, not {type(x).__qualname__}")
        if dtype_of(x) != expected_dtype:
            raise TypeError(f"{name} must have dtype {expected_dtype}, not {dtype_of(x)}")
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, not {tuple(x.shape)}")
        check_places(("q", name), (q, x), kind)
    lse_view = lse[None, ...] if layout == PACKED else lse
    return (to_bshd(dout, layout), *views, to_bshd(out, layout), lse_view), geometry, settings


def _check_context(ctx: Any, geometry: Geometry, comm: Any, rows: tuple[int, int]) -> None:
    if ctx is None:
        return
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx must be what ulysses_attention returned with return_ctx=True, not {type(ctx).__name__}")
    ranks = len(ctx.q_rows)
    theirs = ctx.geometry, ranks, *((ctx.q_rows[comm.rank], ctx.k_rows[comm.rank]) if ranks == comm.size else ())
    if theirs != (geometry, comm.size, *rows):
        raise ValueError(f"ctx is of another call: of {ctx.geometry} on {ranks} ranks, not {geometry} on {comm.size}")


def _to_user(grads: Sequence[Any], dsinks: Any, options: Options, like: Any) -> tuple[Any, ...]:
    results = tuple(from_usm(from_bshd(x, options.layout), like) for x in grads)
    return results if dsinks is None else (*results, from_usm(dsinks, like))


def _differentiate_whole(arrays: Sequence[Any], geometry: Geometry, options: Options) -> tuple[list[Any], Any]:
    """The gradients of USM arrays (dout, q, k, v, out, lse) with all rows and all heads, in new ones; and that of the sinks."""
    dout, q, k, v, out, lse = arrays
    delta = _delta(dout, out, lse.dtype, options)
    grads = [empty_out(x, options.layout) for x in (q, k, v)]
    _differentiate((dout, q, k, v, lse, delta), grads, options, HeadMap(geometry.group))
    return grads, _of_sinks(lse, delta, options.sinks)


def _delta(dout: Any, out: Any, compute: Any, options: Options) -> Any:
    """Sum of dout * out of every query row, (batch, heads, seq), in scratch memory and the dtype of the computation."""
    batch, seq, heads, _ = out.shape
    with stage("delta"):
        delta = scratch(out.sycl_queue, "delta", (batch, heads, seq), compute)
        options.backend.delta(dout, out, delta)
    return delta


def _of_sinks(lse: Any, delta: Any, sinks: np.ndarray | None) -> Any:
    """Gradient of the sinks of these heads: the share of a sink in each row, times -delta."""
    if sinks is None:
        return None
    logits = tensor.asarray(sinks.reshape(1, -1, 1), dtype=lse.dtype, sycl_queue=lse.sycl_queue)
    weight = tensor.where(logits == -np.inf, 0, tensor.exp(logits - lse))  # -inf - -inf would be nan
    return -tensor.sum(weight * delta, axis=(0, 2), dtype=lse.dtype)


def _differentiate(arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
    """Compute gradients of USM arrays (dout, q, k, v, lse, delta) into `grads`: dq, dk, dv, dense in the last axis."""
    with stage("attention backward"):
        if arrays[0].size:
            options.backend.backward(arrays, grads, options, heads)
        else:  # no query, or no head for this rank: nothing reaches the keys
            for grad in grads:
                grad[...] = 0


@dataclass
class _Path:
    """What all parts of a call have in common, and the memory for their results."""

    course: Course
    wire: mpi.Wire
    arrays: Sequence[Any]  # dout, q, k, v, out, lse
    q_rows: tuple[int, ...]
    k_rows: tuple[int, ...]
    geometry: Geometry
    options: Options
    shared: bool  # whether several ranks read one kv head: then their gradients travel in the dtype of the computation

    def start(self) -> None:
        """What is computed of all heads before anything is sent, and the memory for the results."""
        dout, q, k, v, out, lse = self.arrays
        delta = _delta(dout, out, lse.dtype, self.options)
        self.rows_of_numbers = as_columns(delta, q.dtype), as_columns(tensor.asarray(lse, order="C"), q.dtype)
        self.dsinks: list[np.ndarray] = []
        self.grads = [empty_out(x, self.options.layout) for x in (q, k, v)]
        # copies where several ranks add up what is rounded to 16 bits at the end
        self.targets = [x if self.dtype == x.dtype else empty_like(x, x.shape, self.dtype) for x in self.grads]

    @property
    def dtype(self) -> Any:
        """The dtype in which gradients travel."""
        return self.arrays[5].dtype if self.shared else self.arrays[1].dtype

    def finish(self) -> tuple[list[Any], Any]:
        """The gradients of the rows of this rank, and of the sinks of its heads, on the host."""
        for target, grad in zip(self.targets, self.grads, strict=True):
            if target is not grad:
                copy_arrays((target,), (grad,))
        return self.grads, np.concatenate(self.dsinks) if self.dsinks else None


class _Part:
    """Some heads of every rank on the whole path: redistribute, differentiate, redistribute."""

    def __init__(self, path: _Path, ctx: Context | None, number: int, heads: tuple[Heads, ...]) -> None:
        self._path, self._mine = path, heads[path.wire.comm.rank]
        self._kept = ctx.parts[number] if ctx else ()
        _, q, _, _, _, lse = path.arrays
        q_heads, kv_heads = query_shares(heads), kv_shares(heads)
        new = partial(Redistribution, path.wire, q, batch=path.geometry.batch)
        width, column_of_lse = path.geometry.head_dim, lse.dtype.itemsize // q.dtype.itemsize
        same_rows = path.q_rows == path.k_rows

        def way_there(shares: list[Share], widths: list[int], rows: tuple[int, ...]) -> Redistribution:
            return new(shares, widths, rows, slot=f"{number} {len(self._there)}")

        # dout and delta, then what `ctx` has kept: q and lse, k and v
        self._there: list[Redistribution] = []
        queries = [width, column_of_lse] if ctx else [width, column_of_lse] * 2
        keys = [] if ctx else [width] * 2
        if same_rows or ctx:
            shares = [q_heads] * len(queries) + [kv_heads] * len(keys)
            self._there.append(way_there(shares, queries + keys, path.q_rows))
        else:
            self._there.append(way_there([q_heads] * len(queries), queries, path.q_rows))
            self._there.append(way_there([kv_heads] * len(keys), keys, path.k_rows))
        # dq, dk, dv
        trips = [(path.q_rows, [q_heads, kv_heads, kv_heads])]
        if not same_rows:
            trips = [(path.q_rows, [q_heads]), (path.k_rows, [kv_heads, kv_heads])]
        self._back = [
            new(shares, [width] * len(shares), rows, dtype=path.dtype, slot=f"{number} back {trip}")
            for trip, (rows, shares) in enumerate(trips)
        ]

    def start(self) -> None:
        """From the rows of this rank to all rows of its heads."""
        course = self._path.course
        course.run(self._pack)
        for there in self._there:
            course.share(there.start_to_gathered)

    def _pack(self) -> None:
        dout, q, k, v, _, _ = self._path.arrays
        delta, lse = self._path.rows_of_numbers
        arrays = [dout, delta] if self._kept else [dout, delta, q, lse, k, v]
        for there in self._there:
            there.pack(arrays[: there.count])
            arrays = arrays[there.count :]

    def compute(self) -> None:
        """Local gradients of what arrived; they are the send buffer of the way back."""
        self.wait()
        self._path.course.run(self._differentiate)
        for back in self._back:
            self._path.course.share(back.start_to_local)

    def _differentiate(self) -> None:
        path, mine = self._path, self._mine
        lse_dtype = path.arrays[5].dtype
        dout, delta, *others = [x for there in self._there for x in there.views]
        delta = _from_columns(delta, lse_dtype, "delta")
        if self._kept:
            q, k, v, lse = self._kept
        else:
            q, lse, k, v = others
            lse = _from_columns(lse, lse_dtype, "lse")
        grads = [x for back in self._back for x in back.views]
        heads = HeadMap(path.geometry.group, mine.shift, mine.q_start)
        _differentiate((dout, q, k, v, lse, delta), grads, path.options, heads)
        if path.options.sinks is not None:
            sinks = path.options.sinks[mine.q_start : mine.q_start + mine.q_count]
            path.dsinks.append(tensor.asnumpy(_of_sinks(lse, delta, sinks)))

    def finish(self) -> None:
        """From all rows of the heads of this rank back to its rows."""
        self.wait()
        self._path.course.run(self._unpack)

    def _unpack(self) -> None:
        targets = self._path.targets
        for back in self._back:
            back.unpack(targets[: back.count])
            targets = targets[back.count :]

    def wait(self) -> None:
        """Wait until no exchange is under way."""
        for move in (*self._there, *self._back):
            self._path.course.share(move.wait)


def _from_columns(x: Any, dtype: Any, name: str) -> Any:
    """The numbers (batch, heads, seq) of this dtype that came in the columns of a message; two of 16 bits are one of 32."""
    if x.dtype == dtype:
        return tensor.permute_dims(x[..., 0], (0, 2, 1))
    batch, seq, heads, _ = x.shape
    numbers = scratch(x.sycl_queue, f"{name} of all rows", (batch, heads, seq), dtype)
    copy_arrays((x,), (as_columns(numbers, x.dtype),))
    return numbers
