"""Which rows of a sequence every rank of a mesh holds, and how to get there and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._call.checks import check_array, check_count, check_device, check_integer
from ._call.options import check_cu_seqlens
from ._device.arrays import from_host, tensor, to_host
from ._device.trace import call
from ._mesh import check_order, check_rows
from ._ranks import mpi
from ._ranks.agree import Checked, Common, agree
from ._ranks.orders import positions, rows_of_ranks
from .mesh import check_ring, ranks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._device.arrays import Array
    from ._ranks.orders import Order
    from .mesh import RingSize


def row_positions(
    seq: int, comm: Any = None, *, order: Order = "contiguous", ring: RingSize = 1, cu_seqlens: Sequence[int] | None = None
) -> np.ndarray:
    """The numbers of the rows of this rank in the whole sequence: for rotary embeddings, and for losses.

    Not collective.

    Parameters
    ----------
    seq : int
        Rows of all ranks.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    order : {"contiguous", "zigzag", "zigzag_ranks", "striped"}
        What this rank holds, for P ranks in `ring` groups, which has number r of the P, and whose group has number g:

        ============  ==================================================================================================
        contiguous    the r-th of P parts
        zigzag        of 2 ring chunks, numbers g and 2 ring - 1 - g, one after the other; of these, its part among the
                      ranks of the group (yunchang)
        zigzag_ranks  of 2 P chunks, numbers r and 2 P - 1 - r (TransformerEngine)
        striped       of rows g, g + ring, g + 2 ring, …, its part among the ranks of the group (striped attention)
        ============  ==================================================================================================

        Parts and chunks are as equal as possible; the first have one row more.
    ring : int or Mesh
        How many groups of consecutive ranks there are, as in `ulysses_attention`.
    cu_seqlens : sequence of int, optional
        Where packed sequences start and end: every one is shared out by itself. With "contiguous" they are not.

    Returns
    -------
    numpy.ndarray
        Numbers from 0 on, int64, in the order in which the rows lie in the arrays of this rank.

    Raises
    ------
    TypeError, ValueError
        An argument is not of its kind or out of its range.

    See Also
    --------
    shard_rows, unshard_rows

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from ulysses_dp import row_positions
    >>> row_positions(8, MPI.COMM_SELF, order="zigzag").tolist()  # one rank holds all
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    # Validate inputs.
    ranks = ranks_of("row_positions", comm, ring)
    # Delegate.
    return _positions(ranks, check_count("seq", seq), order, ring, cu_seqlens)[ranks.rank]


def shard_rows(
    x: Any,
    comm: Any = None,
    *,
    order: Order = "contiguous",
    ring: RingSize = 1,
    axis: int = 1,
    cu_seqlens: Sequence[int] | None = None,
) -> Any:
    """The rows of this rank of an array that every rank has whole.

    Not collective.

    Parameters
    ----------
    x : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Any axes and strides.
    comm, order, ring
        As in `row_positions`.
    axis : int
        Of the rows.
    cu_seqlens
        As in `row_positions`.

    Returns
    -------
    same kind, dtype and device as x
        The rows of this rank, in the order of `row_positions`: a copy.

    Raises
    ------
    TypeError, ValueError
        An argument is not of its kind or out of its range.

    See Also
    --------
    unshard_rows : the inverse.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from ulysses_dp import shard_rows
    >>> shard_rows(np.ones((1, 8, 2, 4)), MPI.COMM_SELF, order="striped").shape
    (1, 8, 2, 4)
    """
    # Validate inputs.
    ranks = ranks_of("shard_rows", comm, ring)
    array = check_array("x", x)
    axis = _check_axis(array, axis)
    rows = _positions(ranks, array.shape[axis], order, ring, cu_seqlens)[ranks.rank]
    check_device(array)
    # Delegate.
    usm = array.usm()
    return array.give(tensor.take(usm, tensor.asarray(rows, sycl_queue=usm.sycl_queue), axis=axis))


def unshard_rows(
    x: Any,
    comm: Any = None,
    *,
    order: Order = "contiguous",
    ring: RingSize = 1,
    axis: int = 1,
    cu_seqlens: Sequence[int] | None = None,
) -> Any:
    """The whole array on every rank, from the rows of all: the inverse of `shard_rows`.

    Collective over `comm`. Goes through the host: made for results and for tests, not for the inner loop of a program.

    Parameters
    ----------
    x : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        The rows of this rank, in the order of `row_positions`. With "contiguous" any number of rows on every rank.
    comm, order, ring
        As in `row_positions`.
    axis : int
        Of the rows.
    cu_seqlens
        As in `row_positions`.

    Returns
    -------
    same kind, dtype and device as x
        All rows in their order, C-contiguous.

    Raises
    ------
    TypeError, ValueError
        On all ranks, if any rank passes a bad argument, if the ranks disagree on anything but their rows, or if these do not
        fit the order.

    See Also
    --------
    shard_rows : the inverse.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import shard_rows, unshard_rows
    >>> x = np.arange(48.0).reshape(1, 24, 2)
    >>> bool((unshard_rows(shard_rows(x, order="zigzag"), order="zigzag") == x).all())
    True
    """
    function = "unshard_rows"
    ranks = ranks_of(function, comm, ring)

    # Validate inputs.
    def check() -> Checked[tuple[Array, int]]:
        array = check_array("x", x)
        at = _check_axis(array, axis)
        ends = check_cu_seqlens("cu_seqlens", cu_seqlens)
        common = {
            "order": check_order(order),
            "ring": check_ring(ring, ranks),
            "cu_seqlens": ends,
            "axis": at,
            "the other axes": (*array.shape[:at], *array.shape[at + 1 :]),
            "dtype": array.dtype,
        }
        check_device(array)
        return Checked((array.shape[at],), Common(function, common), (array, at))

    with call(function):
        agreement = agree(ranks, function, check)
        (array, at), counts = agreement.result, tuple(rows for (rows,) in agreement.sizes)
        held = _positions(ranks, sum(counts), order, ring, cu_seqlens, counts)
        check_rows(function, "x", counts, tuple(map(len, held)), order, check_ring(ring, ranks))
        # Delegate.
        usm = array.usm()
        joined = mpi.join_rows(ranks, np.moveaxis(to_host(usm), at, 0), counts)
        whole = np.empty_like(joined)
        whole[np.concatenate(held)] = joined
        return array.give(from_host(np.ascontiguousarray(np.moveaxis(whole, 0, at)), usm.sycl_queue))


def _positions(
    ranks: mpi.Ranks, seq: int, order: Any, ring: Any, cu_seqlens: Any, counts: tuple[int, ...] | None = None
) -> list[np.ndarray]:
    """The numbers of the rows of every rank; with "contiguous", so many as are given."""
    size, known, ends = check_ring(ring, ranks), check_order(order), check_cu_seqlens("cu_seqlens", cu_seqlens)
    if ends is not None and ends[-1] != seq:
        raise ValueError(f"cu_seqlens must end with the {seq} rows of all ranks, not with {ends[-1]}")
    if known == "contiguous":
        return [positions(rows) for rows in rows_of_ranks(seq, ranks.size, size, known, None, counts)]
    return [positions(rows) for rows in rows_of_ranks(seq, ranks.size, size, known, ends)]


def _check_axis(x: Array, axis: Any) -> int:
    check_integer("axis", axis)
    count = len(x.shape)
    if not -count <= axis < count:
        raise ValueError(f"axis must be one of the {count} axes of x, not {axis}")
    return int(axis) % count
