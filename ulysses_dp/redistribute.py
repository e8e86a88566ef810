"""Trade the split of an array over the ranks: rows for heads, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ulysses_dp.kernels.relayout import Panel, relayout, source_of, target_of

from . import _exchange
from ._arrays import dtype_of, empty_like, from_usm, permute, scratch, to_usm, view
from ._layout import axes_to_bshd, inverse
from ._partition import Trade, split, starts
from ._trace import stage
from ._validate import agree, check_axes, check_axis_count, check_count, check_device, check_dtype, check_exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ._partition import Share


def scatter_heads(x: Any, /, *, comm: Any = None, exchange: str = "auto") -> Any:
    """Trade the split by rows for the split by heads: every rank gives its rows of all heads and gets all rows of its heads.

    Collective over `comm`. One relayout pass and one all-to-all; without ranks to trade with, neither.

    Parameters
    ----------
    x : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        (batch, seq_local, heads, head_dim), float32, float64, float16, bfloat16 or uint16, any strides. seq_local may differ
        between ranks and may be 0; the ranks hold consecutive rows in rank order.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    exchange : {"auto", "device", "host"}
        Give MPI the device pointers, or copy through pinned host memory; "auto" finds out what MPI supports.

    Returns
    -------
    same kind, dtype and device as x
        (batch, seq, heads_local, head_dim), where seq is the sum of all seq_local. The first ``heads % P`` ranks have one head
        more than the others. The result is a view of an array whose axes are ordered (seq, batch, heads, head_dim): the
        order in which the rows arrive. With only one rank it is a view of x, or for NumPy a copy.

    Raises
    ------
    TypeError, ValueError
        On all ranks, if any rank passes a bad argument, or if batch, heads, head_dim or dtype differ between ranks.

    See Also
    --------
    gather_heads : the inverse.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import gather_heads, scatter_heads
    >>> x = np.arange(24, dtype=np.float32).reshape(1, 3, 4, 2)  # 3 rows of all 4 heads on every rank
    >>> y = scatter_heads(x)  # all rows of heads_local heads
    >>> bool((gather_heads(y) == x).all())
    True
    """
    return _trade("scatter_heads", x, comm, lambda: (True, (0, 1, 2, 3)), exchange=exchange)


def gather_heads(x: Any, /, *, comm: Any = None, seq_local: int | None = None, exchange: str = "auto") -> Any:
    """Trade the split by heads for the split by rows: the inverse of `scatter_heads`.

    Collective over `comm`. One all-to-all and one relayout pass; one pass more if x is not stored in the order
    (seq, batch, heads, head_dim), as the result of `scatter_heads` is, and any C-contiguous array with batch 1.

    Parameters
    ----------
    x : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        (batch, seq, heads_local, head_dim), float32, float64, float16, bfloat16 or uint16, any strides. heads_local may differ
        between ranks and may be 0; the ranks hold consecutive heads in rank order.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    seq_local : int, optional
        Rows that this rank gets. By default the first ``seq % P`` ranks get one row more than the others.
    exchange : {"auto", "device", "host"}
        Give MPI the device pointers, or copy through pinned host memory; "auto" finds out what MPI supports.

    Returns
    -------
    same kind, dtype and device as x
        (batch, seq_local, heads, head_dim), where heads is the sum of all heads_local. C-contiguous, unless there is only
        one rank: then it is a view of x, or for NumPy a copy.

    Raises
    ------
    TypeError, ValueError
        On all ranks, if any rank passes a bad argument, if batch, seq, head_dim or dtype differ between ranks, or if the
        seq_local of all ranks do not add up to seq.

    See Also
    --------
    scatter_heads : the inverse.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from ulysses_dp import gather_heads
    >>> x = np.ones((1, 2 * MPI.COMM_WORLD.size, 1, 2), dtype=np.float32)  # all rows of one head on every rank
    >>> gather_heads(x).shape == (1, 2, MPI.COMM_WORLD.size, 2)  # 2 rows of all heads
    True
    """
    return _trade("gather_heads", x, comm, lambda: (False, (0, 1, 2, 3)), exchange=exchange, seq_local=seq_local)


def all_to_all_4d(x: Any, scatter_idx: int = 2, gather_idx: int = 1, comm: Any = None, use_sync: bool = False) -> Any:
    """Split one axis of a 4-D array over the ranks and join another: `scatter_heads` and `gather_heads` for any two axes.

    Collective over `comm`. The signature is that of ``SeqAllToAll4D`` in yunchang.

    Parameters
    ----------
    x : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        4 axes, float32, float64, float16, bfloat16 or uint16, any strides.
    scatter_idx, gather_idx : int
        The axis that is split and the axis that is joined; they differ. The length of the joined axis may differ between
        ranks.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    use_sync : bool
        Return only when the result is complete. It always is.

    Returns
    -------
    same kind, dtype and device as x
        Axis `gather_idx` has the sum of the ranks' lengths. Axis `scatter_idx` has this rank's part: the first ranks have one
        more where its length is not a multiple of the number of ranks.

    Raises
    ------
    TypeError, ValueError
        On all ranks, if any rank passes a bad argument or if the other axes, the dtype or the axis numbers differ.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from ulysses_dp import all_to_all_4d
    >>> P = MPI.COMM_WORLD.size
    >>> x = np.ones((1, 3, 2 * P, 4), dtype=np.float32)
    >>> all_to_all_4d(x, scatter_idx=2, gather_idx=1).shape == (1, 3 * P, 2, 4)
    True
    """

    def direction() -> tuple[bool, tuple[int, ...]]:
        # whichever axis comes first of the two is taken for the rows, the other for the heads
        heads, rows = check_axes(scatter_idx=scatter_idx, gather_idx=gather_idx)
        joins_rows = rows < heads
        return joins_rows, axes_to_bshd(heads, rows) if joins_rows else axes_to_bshd(rows, heads)

    return _trade("all_to_all_4d", x, comm, direction)


def _trade(
    function: str,
    x: Any,
    comm: Any,
    direction: Callable[[], tuple[bool, tuple[int, ...]]],
    *,
    exchange: str = "auto",
    seq_local: int | None = None,
) -> Any:
    """Do what the public functions above say. `direction` tells whether rows are joined, and which axes are bshd."""
    comm = _exchange.resolve_comm(function, comm)

    # Validate inputs.
    def check() -> tuple[tuple[int, ...], dict[str, Any], tuple[Any, ...]]:
        joins_rows, axes = direction()
        check_exchange(exchange)
        check_axis_count("x", x)
        check_dtype("x", x, "bfloat16" if dtype_of(x) == "uint16" else None)
        check_device(x)
        batch, seq, heads, width = (x.shape[axis] for axis in axes)
        pair = (axes[2], axes[1]) if joins_rows else (axes[1], axes[2])
        common = {
            "scatter_idx and gather_idx": pair,
            f"batch (axis {axes[0]})": batch,
            f"head_dim (axis {axes[3]})": width,
            "dtype": dtype_of(x),
        }
        if joins_rows:
            return (seq,), {**common, "heads": heads}, (joins_rows, axes)
        wanted = split(seq, comm.size)[comm.rank] if seq_local is None else check_count("seq_local", seq_local)
        return (heads, wanted), {**common, "seq": seq}, (joins_rows, axes)

    sizes, (joins_rows, axes) = agree(comm, function, check)
    if not joins_rows and sum(wanted for _, wanted in sizes) != x.shape[axes[1]]:
        rows = ", ".join(str(wanted) for _, wanted in sizes)
        raise ValueError(f"{function}: the seq_local of all ranks ({rows}) must add up to seq, {x.shape[axes[1]]}")
    # Delegate.
    like, x = x, to_usm(permute(x, axes))
    if comm.size > 1:
        route = _exchange.choose_route(x.sycl_queue, exchange)
        if joins_rows:
            (x,) = to_gathered(comm, route, [x], [blocks_of(split(x.shape[2], comm.size))], column(sizes, 0))
        else:
            shares = [blocks_of(column(sizes, 0))]
            trade = trade_of(comm.rank, column(sizes, 1), shares, [x.shape[3]], x.shape[0])
            x = _gather(comm, route, trade, shares, x)
    return from_usm(permute(x, inverse(axes)), like)


def to_gathered(
    comm: Any, route: _exchange.Route, arrays: Sequence[Any], shares: Sequence[Share], rows: tuple[int, ...], *, slot: str = ""
) -> list[Any]:
    """Bring arrays with the same rows to the split by heads: one relayout pass, one message to every other rank.

    Parameters
    ----------
    comm, route
        The ranks, and the way to them.
    arrays : sequence of usm_ndarray
        Each (batch, rows of this rank, heads, width); the widths may differ.
    shares : sequence of Share
        Per array, which of its heads each rank gets; they may overlap.
    rows : tuple of int
        Rows of every rank.
    slot : str
        Receive into the scratch memory of this name; into new memory by default.

    Returns
    -------
    list of usm_ndarray
        Each (batch, all rows, heads of this rank, width): views of the one received buffer.
    """
    widths = [x.shape[3] for x in arrays]
    trade = trade_of(comm.rank, rows, shares, widths, arrays[0].shape[0])
    queue, dtype = arrays[0].sycl_queue, arrays[0].dtype
    with stage("pack"):
        sent = scratch(queue, "local", (trade.local_size,), dtype)
        panels = [
            Panel(*source_of(number, arrays[number], first), *(0, place, *strides), *(count, widths[number]))
            for number, first, count, place, strides in _blocks(trade, shares, widths)
        ]
        relayout(arrays, [sent], panels, rows=rows[comm.rank], batch=trade.batch)
    size = (trade.gathered_size,)
    received = scratch(queue, slot, size, dtype) if slot else empty_like(arrays[0], size)
    _exchange.to_gathered(comm, route, trade, sent, received)
    return gathered_views(trade, shares, widths, received)


def trade_of(rank: int, rows: tuple[int, ...], shares: Sequence[Share], widths: Sequence[int], batch: int) -> Trade:
    """The exchange of arrays of which every rank gets these heads, of these widths."""
    pairs = list(zip(shares, widths, strict=True))
    sizes = tuple(sum(share[peer][1] * width for share, width in pairs) for peer in range(len(rows)))
    return Trade(rank, rows, sizes, batch)


def gathered_views(trade: Trade, shares: Sequence[Share], widths: Sequence[int], gathered: Any) -> list[Any]:
    """The arrays in the flat buffer of the gathered side, each (batch, all rows, heads of this rank, width)."""
    size = trade.sizes[trade.rank]
    views, first = [], 0
    for share, width in zip(shares, widths, strict=True):
        count = share[trade.rank][1]
        shape, strides = (trade.batch, sum(trade.rows), count, width), (size, trade.batch * size, width, 1)
        views.append(view(gathered, first, shape, strides))
        first += count * width
    return views


def _blocks(
    trade: Trade, shares: Sequence[Share], widths: Sequence[int]
) -> Iterator[tuple[int, int, int, int, tuple[int, int, int]]]:
    """Where arrays lie in the buffer of the local side: the block of every peer is (row, batch, its heads of every array).

    Yields number of the array, first head, heads, place, and the strides of rows, batch and heads.
    """
    for peer, base in enumerate(starts(trade.local_counts)):
        size, place = trade.sizes[peer], base
        for number, (share, width) in enumerate(zip(shares, widths, strict=True)):
            first, count = share[peer]
            yield number, first, count, place, (trade.batch * size, size, width)
            place += count * width


def to_local(
    comm: Any, route: _exchange.Route, trade: Trade, gathered: Any, targets: Sequence[Any], shares: Sequence[Share]
) -> None:
    """Bring the split by heads back to the split by rows: one message to every other rank, one relayout pass.

    Parameters
    ----------
    comm, route
        The ranks, and the way to them.
    trade : Trade
        The two splits, as `trade_of` makes them.
    gathered : usm_ndarray
        Flat, in the order of `gathered_views`.
    targets : sequence of usm_ndarray
        Receive the arrays: (batch, rows of this rank, heads, width), dense in the last axis.
    shares : sequence of Share
        Per array, the heads that come from each rank. What several ranks have of one head is added up in rank order.
    """
    received = scratch(gathered.sycl_queue, "local", (trade.local_size,), gathered.dtype)
    _exchange.to_local(comm, route, trade, gathered, received)
    widths = [x.shape[3] for x in targets]
    panels, covered = [], [0] * len(targets)  # heads of each array that the ranks so far have brought
    for number, first, count, place, (row, batch, head) in _blocks(trade, shares, widths):
        again = min(max(covered[number] - first, 0), count)
        covered[number] = max(covered[number], first + count)
        for skip, heads in ((0, again), (again, count - again)):
            source = (0, place + skip * head, row, batch, head, 1)
            target = target_of(number, targets[number], first + skip)
            panels.append(Panel(*source, *target, heads, widths[number], add=int(skip < again)))
    with stage("unpack"):
        relayout([received], targets, panels, rows=trade.rows[comm.rank], batch=trade.batch)


def _gather(comm: Any, route: _exchange.Route, trade: Trade, shares: Sequence[Share], x: Any) -> Any:
    """`gather_heads` of a USM array."""
    batch, rows, heads, width = x.shape
    strides = (heads * width, batch * heads * width, width, 1)
    as_sent = all(n <= 1 or a == b for n, a, b in zip(x.shape, x.strides, strides, strict=True))
    if not as_sent or x._element_offset:
        with stage("pack"):
            copy = view(scratch(x.sycl_queue, "gathered", (x.size,), x.dtype), 0, x.shape, strides)
            panel = Panel(*source_of(0, x), *target_of(0, copy), heads, width)
            relayout([x], [copy], [panel], rows=rows, batch=batch)
        x = copy
    all_heads = sum(count for _, count in shares[0])
    result = empty_like(x, (batch, trade.rows[comm.rank], all_heads, width))
    to_local(comm, route, trade, view(x, 0, (x.size,), (1,)), [result], shares)
    return result


def column(table: Sequence[tuple[int, ...]], index: int) -> tuple[int, ...]:
    """One column of a table of integers."""
    return tuple(row[index] for row in table)


def blocks_of(counts: tuple[int, ...]) -> Share:
    """The heads of every rank if the ranks have consecutive blocks of them."""
    return list(zip(starts(counts), counts, strict=True))
