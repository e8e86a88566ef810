"""Attention of a few query rows to a key-value cache that stays split over the ranks: one step of generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _local
from ._call.checks import check_count, check_flag
from ._call.definitions import takes
from ._call.layout import PACKED
from ._call.spans import Block
from ._device.arrays import from_host, to_host
from ._device.copies import copy_arrays
from ._device.queue import device_turn
from ._device.trace import call, stage
from ._device.workspace import scratch
from ._local import LocalOptions
from ._ranks import mpi
from ._ranks.agree import Checked, CollectiveCall, Common, agree
from ._ranks.orders import Segment
from ._ranks.partition import HeadMap
from ._ring import check_lse
from .attention import check_more, watched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ._call.checks import Geometry
    from ._call.options import Options
    from ._device.arrays import Array


@takes(LocalOptions)
def decode_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    /,
    *,
    comm: Any = None,
    lengths: int | Sequence[int] | None = None,
    return_lse: bool = False,
    return_max_logit: bool = False,
    **options: Unpack[LocalOptions],
) -> Any:
    """Attention of query rows that all ranks have to keys and values of which every rank has some rows.

    Collective over `comm`. Every rank attends to its rows, and the results are merged by their softmax denominators. Nothing of
    the cache moves: what travels is a result and a number per head from each rank. Made for few rows, as in generation.

    Parameters
    ----------
    q : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries, (batch, seq_q, heads, head_dim) or what `layout` says, the same on all ranks: the last rows of the sequence.
        Dtypes and head_dim as in `attention`.
    k_cache, v_cache : same kind, dtype and device as q
        Keys and values of this rank, (batch, rows, kv_heads, head_dim). The ranks hold consecutive rows in rank order; rows may
        differ between ranks and may be 0.
    {options}
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    lengths : int or sequence of int, optional
        How many rows of the cache of this rank count, from the first one on: a cache may be larger than what it holds. A
        sequence has a number for every batch; then, `bias`, `key_padding_mask` and `dropout_p` are a ValueError.
    return_lse : bool
        Also return the logarithm of the softmax denominators.
    return_max_logit : bool
        Also return the largest score of every head, for which all scores are computed again.

    Returns
    -------
    out : same kind, dtype and device as q
        The shape of q, but for the head_dim, which is that of v_cache; C-contiguous, the same on all ranks.
    lse : same kind and device as q
        Only with `return_lse`: natural logarithm of the softmax denominator, (batch, heads, seq_q).
    max_logit : same kind and device as q
        Only with `return_max_logit`, as the last result: as that of `ulysses_attention`, the same on all ranks.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ImportError
        On all ranks, as `ulysses_attention` does. Packed sequences are a ValueError, and so is a bias on several ranks that is
        so large for all keys of a query that lse has lost their number: from 4096 on in float32.

    See Also
    --------
    merge_attention : joins attention over different keys on one rank.

    Notes
    -----
    The last query and the last key of all ranks have distance 0: with `causal`, query i sees the keys up to number
    ``total - seq_q + i``. Where neither positions nor `bias` matter (one query row without window, ALiBi and mask), a new row
    may be appended on any rank; that keeps the ranks equally loaded. Each rank sends
    ``(P - 1) · batch · seq_q · heads · (head_dim + 1)`` numbers, float32 or float64, whatever the length of the cache.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import decode_attention
    >>> q = np.ones((1, 1, 4, 8), dtype=np.float32)  # one new row, on every rank
    >>> cache = np.ones((1, 16, 2, 8), dtype=np.float32)  # 16 rows on every rank
    >>> decode_attention(q, cache, cache).shape
    (1, 1, 4, 8)
    """
    function = "decode_attention"
    ranks = mpi.resolve_comm(function, comm)

    # Validate inputs.
    def check() -> Checked[tuple[Array, list[Any], Geometry, Options, tuple[int, ...]]]:
        check_flag("return_lse", return_lse)
        more = check_more(return_max_logit)
        given, geometry, settings = _local.check_attention(q, k_cache, v_cache, return_lse=True, more=more, **options)
        if settings.layout == PACKED:
            raise ValueError(f"layout must not be {PACKED!r}: a cache holds one sequence per batch")
        if not settings.backend.in_blocks:
            settings.backend.refuse("a cache that is split over ranks")
        arrays = _local.to_usm(given, settings.layout)
        rows = arrays[1].shape[1]
        used = _check_lengths(lengths, rows, settings)
        if len(used) not in (1, geometry.batch):
            raise ValueError(f"lengths must be a number or {geometry.batch}, one for every batch, not {len(used)}")
        queries = {"seq_q": arrays[0].shape[1], "numbers in lengths": len(used)}
        queries |= {"return_lse": return_lse, "return_max_logit": return_max_logit}
        common = vars(geometry) | settings.common() | queries
        return Checked((max(used),), Common(function, common), (given[0], arrays, geometry, settings, used))

    with call(function):
        agreement = agree(ranks, function, check)
        like, arrays, geometry, settings, used = agreement.result
        seq_q = arrays[0].shape[1]
        everywhere = np.array(agreement.sizes) if len(used) == 1 else mpi.join(ranks, used).reshape(ranks.size, geometry.batch)
        for keys_of_batch in everywhere.sum(axis=0).tolist():
            settings.check_lengths(function, seq_q, keys_of_batch)
        # Delegate.
        largest, settings = watched(settings, geometry, return_max_logit)
        collective = CollectiveCall(ranks, function)
        blocks = []
        for of_batch in everywhere.T.tolist():
            keys = Segment(sum(of_batch[: ranks.rank]), of_batch[ranks.rank])
            blocks.append(Block(Segment(0, seq_q), keys, seq_q, sum(of_batch)))
        part = collective.local(_attend, arrays, geometry, settings, blocks)
        if part is None:  # the others wait for this rank
            part = np.zeros((*arrays[0].shape[:3], geometry.head_dim_v + 1), geometry.compute_dtype)
        with stage("merge", bytes_sent=part.nbytes * (ranks.size - 1), messages=ranks.size - 1, exchange=True):
            parts = mpi.join_rows(ranks, part[None], (1,) * ranks.size)
        collective.confirm()
        out, lse = _merge(parts, settings.sinks)
        if settings.bias is not None and ranks.size > 1:
            check_lse(lse, "with a bias and a cache that is split over ranks")
        with device_turn:
            results = _results(out, lse, arrays[0], settings, like, return_lse=return_lse)
        if largest is not None:
            results.append(like.give(from_host(largest.of_all(ranks), arrays[0].sycl_queue)))
        return _local.alone_or_all(results)


def _check_lengths(lengths: Any, rows: int, options: Options) -> tuple[int, ...]:
    """How many rows of the cache count: one number, or one for every batch."""
    if lengths is None:
        return (rows,)
    several = isinstance(lengths, (tuple, list)) or (isinstance(lengths, np.ndarray) and lengths.ndim == 1)
    used = tuple(check_count("lengths", n) for n in (lengths if several else (lengths,)))
    for n in used:
        if n > rows:
            raise ValueError(f"lengths must be at most the {rows} rows of k_cache, not {n}")
    if len(used) > 1:
        for name in ("bias", "key_padding_mask", "dropout_p"):
            if getattr(options, name) is not None and not (name == "dropout_p" and options.dropout_p == 0):
                raise ValueError(f"{name} needs as many keys in every batch: lengths must be one number, not {len(used)}")
    return used


def _attend(arrays: list[Any], geometry: Geometry, options: Options, blocks: list[Block]) -> np.ndarray:
    """Attention to the keys of this rank, on the host: (batch, seq_q, heads, head_dim + 1), whose last number is lse.

    There is one block for all batches, or one for each.
    """
    q, k, v = arrays
    compute = np.dtype(geometry.compute_dtype)
    out = scratch(q.sycl_queue, "decode out", (*q.shape[:3], geometry.head_dim_v), compute)
    lse = scratch(q.sycl_queue, "decode lse", (geometry.batch, geometry.heads, q.shape[1]), compute)
    for number, block in enumerate(blocks):
        batch, of_batch = (slice(None), options) if len(blocks) == 1 else (slice(number, number + 1), options.of_batch(number))
        keys, values = (x[batch, : block.keys.length] for x in (k, v))
        _local.attend(q[batch], keys, values, out[batch], lse[batch], of_batch.of_block(block), HeadMap(geometry.group))
    return np.concatenate([to_host(out), to_host(lse).swapaxes(1, 2)[..., None]], axis=-1)


def _merge(parts: np.ndarray, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of all keys, from those of the ranks, added up in rank order; a sink is a part without a value."""
    outs, lses = parts[..., :-1], parts[..., -1].astype(np.float64)
    of_sinks = -np.inf if sinks is None else sinks
    highest = np.maximum(lses.max(axis=0), of_sinks)
    highest = np.where(np.isneginf(highest), 0, highest)
    weights = np.exp(lses - highest)
    total = weights.sum(axis=0) + np.exp(of_sinks - highest)
    with np.errstate(divide="ignore"):
        lse = highest + np.log(total)
    shares = weights / np.where(total == 0, 1, total)
    # what has seen no key has no share, whatever it holds
    out = sum(np.where(share == 0, 0, share * x) for share, x in zip(shares[..., None], outs, strict=True))
    return np.asarray(out).astype(parts.dtype), lse.swapaxes(1, 2).astype(parts.dtype)


def _results(out: np.ndarray, lse: np.ndarray, usm_q: Any, options: Options, like: Array, *, return_lse: bool) -> list[Any]:
    """As the user wants them."""
    result, near = _local.empty_out(usm_q, options.layout, out.shape[3]), from_host(out, usm_q.sycl_queue)
    copy_arrays((near,), (result,))
    user_out = _local.to_user(result, options.layout, like)
    return [user_out, like.give(from_host(np.ascontiguousarray(lse), usm_q.sycl_queue))] if return_lse else [user_out]
