"""Trade the split of an array over the ranks: rows for heads, and back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

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
from ._call.definitions import by_value
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
    from collections.abc import Sequence

    import numpy as np

    from ._device.arrays import Array


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
    wish = {"scatter_idx": 2, "gather_idx": 1, "exchange": exchange, "node_size": node_size}
    return _redistribute("scatter_heads", x, comm, wish)


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
    wish = {"scatter_idx": 1, "gather_idx": 2, "exchange": exchange, "node_size": node_size, "seq_local": seq_local}
    return _redistribute("gather_heads", x, comm, wish)


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
    return _redistribute("all_to_all_4d", x, comm, {"scatter_idx": scatter_idx, "gather_idx": gather_idx})


def _redistribute(function: str, x: Any, comm: Any, wish: dict[str, Any]) -> Any:
    """Do what the public functions above say."""
    ranks, plain = mpi.resolve_comm(function, comm), by_value(wish)
    exchange, node_size, seq_local = wish.get("exchange", "auto"), wish.get("node_size", 1), wish.get("seq_local")

    # Validate inputs.
    def check() -> Checked[tuple[Array, Any, _Kind, Any]]:
        given = check_array("x", x)

        def check_kind() -> _Kind:
            # whichever axis comes first of the two is taken for the rows, the other for the heads
            heads_axis, rows_axis = check_axes(scatter_idx=wish["scatter_idx"], gather_idx=wish["gather_idx"])
            to_heads = rows_axis < heads_axis
            axes = axes_to_bshd(heads_axis, rows_axis) if to_heads else axes_to_bshd(rows_axis, heads_axis)
            check_node_size(node_size, ranks.size)
            check_axis_count("x", given)
            if given.dtype not in BITS.values():  # which are moved as they are, whatever they hold
                check_dtype("x", given, None)
            batch, seq, heads, width = shape = tuple(given.shape[axis] for axis in axes)
            common = {
                "scatter_idx and gather_idx": (heads_axis, rows_axis),
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
            return _Kind(to_heads, axes, inverse(axes), shape, sizes, Common(function, common))

        kind = ranks.remembered.once((function, given[1:], plain), check_kind) if plain is not None else check_kind()
        check_device(given)
        usm = permute(given.usm(), kind.axes)
        # what is stored as it is sent needs no memory by heads
        in_place = None if kind.to_heads or exchange == "shared" else _as_sent(usm)
        memory_key = usm.sycl_queue, exchange, in_place is not None
        renew = partial(_path.renew, like=usm) if kind.to_heads else None
        return Checked(kind.sizes, kind.common, (given, usm, kind, in_place), memory_key, renew)

    with call(function):
        agreement = agree(ranks, function, check)
        given, usm, kind, in_place = agreement.result

        def lay_out() -> Lists:
            return _lists(function, kind, agreement.sizes, usm.dtype)

        lists = ranks.remembered.once((kind.common, *agreement.sizes), lay_out)
        # Delegate.
        result = usm
        if ranks.size > 1:
            link = mpi.link(ranks, usm.sycl_queue, exchange=exchange, node_size=node_size)
            if kind.to_heads:
                _, (result,) = _path.run(function, agreement, ranks, link, _to_heads(usm, lists))
            else:
                results, _ = _path.run(function, agreement, ranks, link, _to_rows(usm, lists, ranks.rank, in_place))
                result = results["x"]
        return given.give(permute(result, kind.back))


class _Kind(NamedTuple):
    """What calls with the same wishes and arrays of one kind have in common."""

    to_heads: bool
    axes: tuple[int, ...]  # of x: batch, rows, heads and head_dim
    back: tuple[int, ...]  # the order of axes that undoes this
    shape: tuple[int, ...]  # in that order
    sizes: tuple[int, ...]  # that may differ between ranks
    common: Common


def _lists(function: str, kind: _Kind, sizes: Sequence[tuple[int, ...]], dtype: np.dtype) -> Lists:
    """What travels: one item to heads, or one back."""
    _, seq, heads, width = kind.shape
    if kind.to_heads:
        return Lists((Item("x", blocks_of(split(heads, len(sizes))), column(sizes, 0), width, dtype),), ())
    if sum(wanted for _, wanted in sizes) != seq:
        wishes = ", ".join(str(wanted) for _, wanted in sizes)
        raise ValueError(f"{function}: the seq_local of all ranks ({wishes}) must add up to seq, {seq}")
    return Lists((), (Item("x", blocks_of(column(sizes, 0)), column(sizes, 1), width, dtype),))


def _to_heads(x: Any, lists: Lists) -> Description:
    """The result is received in place."""
    return Description("", x, x.shape[0], [lists], lambda: ({"x": x}, {}), lambda _, arrays: arrays["x"], keep=True)


def _to_rows(x: Any, lists: Lists, rank: int, in_place: Any) -> Description:
    """What is sent is x in its place, or else a copy, as where others read it."""
    batch, _, _, width = x.shape
    (item,) = lists.to_rows

    def begin() -> tuple[Arrays, Arrays]:
        return {}, {"x": empty_like(x, (batch, item.rows[rank], sum(count for _, count in item.heads), width))}

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
