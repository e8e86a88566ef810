"""Trade the split of an array over the ranks: rows for heads, and back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from . import _path
from ._call.checks import (
    check_array,
    check_axes,
    check_axis_count,
    check_count,
    check_device,
    check_dtype,
    check_exchange,
    check_node_size,
    shared_or_not,
)
from ._call.layout import axes_to_bshd, inverse, permute
from ._device.arrays import view
from ._device.copies import copy_arrays
from ._device.dtypes import BITS
from ._device.trace import call, stage
from ._device.workspace import empty_like
from ._path import Arrays, Description, Lists
from ._ranks import mpi
from ._ranks.agree import Checked, Common, agree
from ._ranks.partition import Item, blocks_of, column, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._device.arrays import Array
    from ._ranks.partition import Share


def scatter_heads(x: Any, /, *, comm: Any = None, exchange: str = "auto", node_size: int | str = 1) -> Any:
    """Trade the split by rows for the split by heads: every rank gives its rows of all heads and gets all rows of its heads.

    Collective over `comm`. One relayout pass and one all-to-all; without ranks to trade with, neither.

    Parameters
    ----------
    x : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        (batch, seq_local, heads, head_dim), float32, float64, float16, bfloat16 or uint16, any strides. seq_local may differ
        between ranks and may be 0; the ranks hold consecutive rows in rank order.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    exchange : {"auto", "device", "host", "shared"}
        As in `ulysses_attention`.
    node_size : int or "auto"
        If more than 1, exchange in two steps, as `ulysses_attention` does.

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
    return _redistribute("scatter_heads", x, comm, lambda: (True, (0, 1, 2, 3)), exchange=exchange, node_size=node_size)


def gather_heads(
    x: Any, /, *, comm: Any = None, seq_local: int | None = None, exchange: str = "auto", node_size: int | str = 1
) -> Any:
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
    exchange : {"auto", "device", "host", "shared"}
        As in `ulysses_attention`.
    node_size : int or "auto"
        If more than 1, exchange in two steps, as `ulysses_attention` does.

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
    direction = False, (0, 1, 2, 3)
    return _redistribute(
        "gather_heads", x, comm, lambda: direction, exchange=exchange, node_size=node_size, seq_local=seq_local
    )


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
        to_heads = rows < heads
        return to_heads, axes_to_bshd(heads, rows) if to_heads else axes_to_bshd(rows, heads)

    return _redistribute("all_to_all_4d", x, comm, direction)


def _redistribute(
    function: str,
    x: Any,
    comm: Any,
    direction: Callable[[], tuple[bool, tuple[int, ...]]],
    *,
    exchange: str = "auto",
    node_size: int | str = 1,
    seq_local: int | None = None,
) -> Any:
    """Do what the public functions above say. `direction` tells whether x goes to heads, and which of its axes are bshd."""
    ranks = mpi.resolve_comm(function, comm)

    # Validate inputs.
    def check() -> Checked[tuple[Array, Any, tuple[int, ...], bool, tuple[int, ...], Any]]:
        to_heads, axes = direction()
        check_node_size(node_size, ranks.size)
        given = check_array("x", x)
        check_axis_count("x", given)
        if given.dtype not in BITS.values():  # which are moved as they are, whatever they hold
            check_dtype("x", given, None)
        check_device(given)
        batch, seq, heads, width = shape = tuple(given.shape[axis] for axis in axes)
        pair = (axes[2], axes[1]) if to_heads else (axes[1], axes[2])
        common = {
            "scatter_idx and gather_idx": pair,
            f"batch (axis {axes[0]})": batch,
            f"head_dim (axis {axes[3]})": width,
            "dtype": given.dtype,
            "exchange": shared_or_not(check_exchange(exchange)),
            "node_size": node_size,
        }
        sizes: tuple[int, ...] = (seq,)
        if to_heads:
            common["heads"] = heads
        else:
            wanted = split(seq, ranks.size)[ranks.rank] if seq_local is None else check_count("seq_local", seq_local)
            sizes, common["seq"] = (heads, wanted), seq
        usm = permute(given.usm(), axes)
        # what is stored as it is sent needs no memory by heads
        in_place = None if to_heads or exchange == "shared" else _as_sent(usm)
        memory_key = usm.sycl_queue, exchange, in_place is not None
        renew = partial(_path.renew, like=usm) if to_heads else None
        return Checked(sizes, Common(function, common), (given, usm, shape, to_heads, axes, in_place), memory_key, renew)

    with call(function):
        agreement = agree(ranks, function, check)
        sizes, (given, usm, (_, seq, heads, _), to_heads, axes, in_place) = agreement.sizes, agreement.result
        if not to_heads and sum(wanted for _, wanted in sizes) != seq:
            wishes = ", ".join(str(wanted) for _, wanted in sizes)
            raise ValueError(f"{function}: the seq_local of all ranks ({wishes}) must add up to seq, {seq}")
        # Delegate.
        result = usm
        if ranks.size > 1:
            link = mpi.link(ranks, usm.sycl_queue, exchange=exchange, node_size=node_size)
            if to_heads:
                what = _to_heads(usm, blocks_of(split(heads, ranks.size)), column(sizes, 0))
                _, (result,) = _path.run(function, agreement, ranks, link, what)
            else:
                what = _to_rows(usm, blocks_of(column(sizes, 0)), column(sizes, 1), ranks.rank, in_place)
                results, _ = _path.run(function, agreement, ranks, link, what)
                result = results["x"]
        return given.give(permute(result, inverse(axes)))


def _to_heads(x: Any, heads: Share, rows: tuple[int, ...]) -> Description:
    """One item to heads and none back: the result is received in place."""
    item = Item("x", heads, rows, x.shape[3], x.dtype)
    lists = Lists((item,), ())
    return Description("", x, x.shape[0], [lists], lambda: ({"x": x}, {}), lambda _, arrays: arrays["x"], keep=True)


def _to_rows(x: Any, heads: Share, rows: tuple[int, ...], rank: int, in_place: Any) -> Description:
    """No item to heads and one back: what is sent is x in its place, or else a copy, as where others read it."""
    batch, _, _, width = x.shape
    lists = Lists((), (Item("x", heads, rows, width, x.dtype),))

    def begin() -> tuple[Arrays, Arrays]:
        return {}, {"x": empty_like(x, (batch, rows[rank], sum(count for _, count in heads), width))}

    def copy(_: int, arrays: Arrays) -> None:
        if in_place is None:
            with stage("pack"):
                copy_arrays([x], [arrays["x"]])

    return Description("", x, batch, [lists], begin, copy, by_heads=in_place)


def _as_sent(x: Any) -> Any:
    """The flat array of an array (batch, seq, heads, width), if it is stored in the order (seq, batch, heads, width)."""
    batch, _, heads, width = x.shape
    strides = (heads * width, batch * heads * width, width, 1)
    as_sent = all(n <= 1 or a == b for n, a, b in zip(x.shape, x.strides, strides, strict=True))
    return view(x, 0, (x.size,), (1,)) if as_sent and not x._element_offset else None


def order_ranks(comm: Any = None) -> Any:
    """The same ranks, those of one node one after the other, and on a node those with neighbouring numbers.

    Collective over `comm`. For communicators whose order is not that of the machine, like the dimensions of a Cartesian one,
    and before a communicator is split into groups that each hold a sequence: consecutive ranks then share a GPU and a node,
    where messages are fastest. Needed for `node_size` of more than 1, which takes consecutive ranks for a node.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.

    Returns
    -------
    mpi4py.MPI.Intracomm
        A new communicator, which the caller frees. Rows travel in its order: rank r of it holds the r-th part of the sequence.

    Raises
    ------
    TypeError, ValueError
        On this rank, if `comm` is no communicator.

    Notes
    -----
    Launchers give neighbouring ranks of a node to neighbouring tiles, if each rank takes the GPU of its number on the node, as
    `ulysses_dp` does. All pairs of ranks exchange as much, so within a node no order is better for one sequence alone.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from ulysses_dp import order_ranks
    >>> ordered = order_ranks(MPI.COMM_WORLD)
    >>> ordered.size == MPI.COMM_WORLD.size
    True
    >>> ordered.Free()
    """
    return mpi.ordered(mpi.resolve_comm("order_ranks", comm))
