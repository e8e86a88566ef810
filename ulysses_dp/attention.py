"""Attention of a sequence that is split over the ranks: Ulysses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _local, _path
from ._call.checks import NAMES, Geometry, Names, check_flag, check_inputs
from ._call.definitions import by_value, parted, takes
from ._device.arrays import from_host
from ._device.copies import copy_arrays
from ._device.queue import device_turn
from ._device.trace import call
from ._device.workspace import empty_like
from ._findings import LargestScores
from ._local import LocalOptions
from ._mesh import Course, MeshOptions, UlyssesOptions, Wish, check_mesh
from ._path import Arrays, Description
from ._ranks import mpi
from ._ranks.agree import Checked, Common, agree
from ._ranks.partition import HeadMap
from ._ranks.redistribution import as_columns
from ._replicated import Replicated, check_replicated
from ._ring import new_ring
from .mesh import ranks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Unpack

    from ._call.options import Options
    from ._device.arrays import Array
    from ._ranks.orders import Place
    from ._ring import Ring


@dataclass(frozen=True, eq=False)
class Context:
    """What `ulysses_attention` keeps for `ulysses_attention_backward`: opaque to users."""

    geometry: Geometry
    ranks: int
    rows: tuple[int, int]  # queries and keys of this rank
    replicated: tuple[int, int]  # queries and keys that all ranks have
    options: dict[str, Any]  # as the user gave them
    wish: Wish
    parts: tuple[Arrays, ...] = ()  # q, k, v and lse of the heads of this rank, in parts; nothing on one rank

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Context cannot be pickled or copied: it holds memory of this rank's device")


@takes(LocalOptions)
def attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    return_lse: bool = False,
    return_max_logit: bool = False,
    **options: Unpack[LocalOptions],
) -> Any:
    r"""Attention of one rank, softmax(softmax_scale * q kᵀ) v, without the seq_q x seq_k matrix.

    Not collective. Returns when the result is complete.

    Parameters
    ----------
    q : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries, (batch, seq_q, heads, head_dim) or what `layout` says; float32, float64, float16 or bfloat16, any strides.
        head_dim is at most 576.
    k, v : same kind, dtype and device as q
        Keys and values, (batch, seq_k, kv_heads, head_dim). heads is a multiple of kv_heads: query head h reads kv head
        ``h // (heads // kv_heads)``. The head_dim of v, which out has, too, may be another than that of q and k.
    {options}
    return_lse : bool
        Also return the logarithm of the softmax denominators.
    return_max_logit : bool
        Also return the largest score of every head, for which all scores are computed again.

    Returns
    -------
    out : same kind, dtype and device as q
        The axes of q, with the head_dim of v; C-contiguous. Zeros for a query that sees no key.
    lse : same kind and device as q
        Only with `return_lse`: natural logarithm of the softmax denominator, (batch, heads, seq_q), or (heads, total) with
        layout "thd"; float64 if q is, else float32. -inf for a query that sees no key and has no sink.
    max_logit : same kind and device as q
        Only with `return_max_logit`: the largest of what the softmax of a head gets, after scale, soft cap, ALiBi and bias, of
        all batches, without what is hidden and without sinks; (heads,), of the dtype of lse. -inf where nothing is seen.

    Raises
    ------
    TypeError
        An argument is not of a supported kind or dtype, or the kinds or dtypes of q, k and v differ.
    ValueError
        The shapes do not fit each other, a number is out of range, or the arrays are on different queues or devices.
    NotImplementedError
        A torch tensor requires a gradient, or `attn_type` does not have one of the options.
    ImportError
        `attn_type` needs a package that is not installed.

    Notes
    -----
    The kernel follows FlashAttention-2 (Dao, arXiv:2307.08691); see ``kernels/flash_forward.py``. 16-bit arrays are computed in
    float32, in copies. A key that a query does not see has no influence on it, even if it is nan or infinite.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 5, 2, 8), dtype=np.float32)
    >>> out = attention(q, k, v, causal=True)
    >>> out.shape
    (1, 5, 2, 8)
    >>> bool(np.allclose(out[0, 0], v[0, 0]))  # the first query sees the first key alone
    True
    """
    # Validate inputs.
    more = check_more(return_max_logit)
    arrays, geometry, settings = _local.check_attention(q, k, v, return_lse=return_lse, more=more, **options)
    settings.check_lengths("attention", *_local.rows_of(arrays, settings.layout))
    # Delegate.
    with call("attention"), device_turn:
        largest, settings = watched(settings, geometry, return_max_logit)
        out, lse = _local.attend_whole(_local.to_usm(arrays, settings.layout), geometry, settings)
        results = _local.results_to_user(out, lse, settings, arrays[0])
        if largest is not None:
            results.append(arrays[0].give(from_host(largest.values, out.sycl_queue)))
        return _local.alone_or_all(results)


@takes(LocalOptions, MeshOptions)
def ulysses_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    comm: Any = None,
    return_lse: bool = False,
    return_max_logit: bool = False,
    return_ctx: bool = False,
    replicated: tuple[Any, Any, Any] | None = None,
    replicated_at: Place = "start",
    **options: Unpack[UlyssesOptions],
) -> Any:
    """Attention over a sequence that is split over the ranks of a communicator.

    Collective over `comm`. Every rank passes its rows of all heads and gets its rows of the result. Two all-to-alls trade the
    split by rows for a split by heads and back; in between, each rank computes ordinary attention on its heads. Returns when
    the result is complete. The communication buffers are kept for the next call (`free_workspace`).

    Parameters
    ----------
    q : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries of this rank, (batch, seq_local, heads, head_dim) or what `layout` says; float32, float64, float16 or bfloat16,
        any strides. The ranks hold consecutive rows in rank order; seq_local may differ between ranks and may be 0. head_dim is
        at most 576.
    k, v : same kind, dtype and device as q
        Keys and values of this rank, (batch, seq_k_local, kv_heads, head_dim). heads is a multiple of kv_heads: query head h
        reads kv head ``h // (heads // kv_heads)``. The head_dim of v, which out has, too, may be another than that of q and k.
        If on any rank seq_k_local is not seq_local, k and v travel in a message of their own.
    {names}
        As in `attention`, in rows of the whole sequences: the result does not depend on the number of ranks. Arrays are for all
        heads and for the rows of all ranks, and the same on every rank, which uses the part for its heads. `cu_seqlens_q`
        counts rows in the concatenation of the rows of all ranks.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default. heads need not be a multiple of the number of ranks, nor be as many.
    return_lse : bool
        Also return the logarithm of the softmax denominators.
    return_max_logit : bool
        Also return the largest score of every head, for which all scores are computed again.
    return_ctx : bool
        Also return what `ulysses_attention_backward` would otherwise have to send again: q, k and v of the heads of this rank,
        ``(heads + 2 kv_heads) / P · batch · seq · head_dim`` numbers, and lse; and the options, which need not be repeated.
    replicated : tuple of q_r, k_r and v_r, optional
        Tokens that every rank has whole, the same on all ranks, such as a text beside a long image: arrays like q, k and v,
        with any number of rows. They count once. With the rows of all ranks they are one sequence, in which options count:
        key_padding_mask, for instance, is for the keys of both.
    replicated_at : {"start", "end"}
        Whether these tokens come before the rows of the ranks or after them.
    {more options}

    Returns
    -------
    out : same kind, dtype and device as q
        The shape of q, but for the head_dim, which is that of v; C-contiguous. Zeros for a query that sees no key.
    lse : same kind and device as q
        Only with `return_lse`: natural logarithm of the softmax denominator, (batch, heads, seq_local), or (heads, total_local)
        with layout "thd"; float64 if q is, else float32. -inf for a query that sees no key and has no sink.
    out_r, lse_r : arrays
        Only with `replicated`, after the others: out and lse of its tokens, the same on all ranks.
    max_logit : same kind and device as q
        Only with `return_max_logit`, after the others: the largest of what the softmax of a head gets, after scale, soft cap,
        ALiBi and bias, of all rows of all ranks, without what is hidden and without sinks; (heads,), the same on all ranks, of
        the dtype of lse. -inf where nothing is seen.
    ctx : Context
        Only with `return_ctx`, as the last result.

    Raises
    ------
    TypeError
        On all ranks, if on any rank an argument is not of a supported kind or dtype.
    ValueError
        On all ranks, if on any rank the shapes do not fit each other, a number is out of range, or the arrays are on different
        queues or devices; or if the ranks disagree on anything but the number of their rows. Of `bias`, only shape and dtype
        are compared.
    NotImplementedError
        On all ranks, if on any rank a torch tensor requires a gradient, or `attn_type` does not have one of the options; or if
        `exchange` is "shared" and the ranks are on several nodes or not on CPU devices.
    OSError
        On all ranks, if `exchange` is "shared" and any rank cannot get that memory.
    ImportError
        On all ranks, if on any rank `attn_type` needs a package that is not installed.

    Notes
    -----
    The method is DeepSpeed-Ulysses (Jacobs et al., arXiv:2309.14509). Each rank sends
    ``(P-1)/P² · batch · seq · head_dim · itemsize · 2 (heads + kv_heads)`` bytes if P divides seq and kv_heads, in one message
    to each other rank and direction.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import ulysses_attention
    >>> q = np.ones((1, 16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> ulysses_attention(q, q, q, causal=True).shape
    (1, 16, 4, 8)
    """
    wanted: dict[str, Any] = {"return_ctx": return_ctx, "return_lse": return_lse, "return_max_logit": return_max_logit}
    wanted |= {"replicated": replicated, "replicated_at": replicated_at}
    return distributed("ulysses_attention", q, k, v, comm=comm, **wanted, **options)


def distributed(
    function: str,
    *inputs: Any,
    comm: Any,
    replicated: Any = None,
    replicated_at: Place = "start",
    return_ctx: bool = False,
    return_max_logit: bool = False,
    names: Names = NAMES,
    unpack: Callable[..., tuple[Any, Any, Any]] | None = None,
    **options: Any,
) -> Any:
    """`ulysses_attention` under any public name, of q, k and v, or of arrays of which `unpack` makes these by the layout."""
    of_mesh, of_attention = parted(options, MeshOptions)
    ranks = ranks_of(function, comm, of_mesh.get("ring"), names.comm)

    of_ranks = by_value(of_mesh | {"replicated_at": replicated_at, "ctx": return_ctx, "dtype": of_attention.get("dtype")})

    # Validate inputs.
    def check() -> Checked[tuple[Array, Sequence[Any], Options, Replicated, Context]]:
        q, k, v = inputs if unpack is None else unpack(*inputs, of_attention.get("layout"))
        more = check_more(return_max_logit)
        given, geometry, settings = _local.check_attention(q, k, v, names, more=more, **of_attention)
        of_tokens: tuple[Array, ...] = ()
        if replicated is not None:
            check_tokens = partial(check_inputs, names=NAMES, layout=settings.layout, dtype=of_attention.get("dtype"))
            of_tokens = check_replicated(replicated, "qkv", check_tokens, given[0], geometry)
        counts = _local.rows_of(of_tokens, settings.layout) if of_tokens else (0, 0)
        its_rows = _local.rows_of(given, settings.layout)

        def check_with_ranks() -> tuple[Replicated, Common, Context]:
            check_flag("return_ctx", return_ctx)
            wish = check_mesh(of_mesh, replicated_at, ranks, geometry, settings)
            how = wish.common() | {"replicated": counts, "return_ctx": return_ctx, "return_max_logit": bool(more)}
            common = Common(function, vars(geometry) | settings.common() | how)
            as_given = {name: value for name, value in of_attention.items() if name != "return_lse"}
            context = Context(geometry, ranks.size, its_rows, counts, as_given, wish)
            return Replicated.of(counts, ranks.size, wish, settings), common, context

        key = (function, ranks, its_rows, counts, more, of_ranks) if of_ranks else object()
        tokens, common, context = settings.remembered.once(key, check_with_ranks)
        wish = context.wish
        arrays = tokens.brought(ranks.rank, "qkv", *[_local.to_usm(x, settings.layout) for x in (given, of_tokens)])
        rows = arrays[0].shape[1], arrays[1].shape[1]
        result = given[0], arrays, settings, tokens, context
        renew = partial(_path.renew, like=arrays[0]) if return_ctx else None
        return Checked(rows, common, result, (arrays[0].sycl_queue, wish.exchange), renew)

    with call(function):
        agreement = agree(ranks, function, check)
        like, arrays, settings, tokens, context = agreement.result
        geometry, wish = context.geometry, context.wish

        def lay_out() -> Course | None:
            travels = partial(_path.forward_lists, geometry, arrays[0].dtype, lse=settings.return_lse, wire=wish.wire)

            def parts(shared: bool) -> int:
                # a backward pass adds up what ranks have of one kv head in the order of the ranks: it stays together
                return 1 if return_ctx and shared else wish.overlap

            return Course.of(
                function, ranks, wish, agreement.sizes, geometry, settings, tokens.shares, parts=parts, travels=travels
            )

        course = settings.remembered.once((context, *agreement.sizes), lay_out)
        # Delegate.
        largest, settings = watched(settings, geometry, return_max_logit)
        parts: list[Arrays] = []
        if course is None:
            with device_turn:
                out, lse = _local.attend_whole(arrays, geometry, settings)
        else:
            way = {"exchange": wish.exchange, "node_size": wish.node_size, "blocking": len(course.shares) == 1}
            link = mpi.link(course.placement.group, arrays[0].sycl_queue, **way)
            ring = new_ring(course.placement, link.route, arrays[1], geometry, settings, course.heads)
            forward = _describe(arrays, geometry, settings, course, keep=return_ctx, ring=ring)
            results, parts = _path.run(function, agreement, ranks, link, forward)
            out, lse = results["out"], results.get("lse")
        results = {"out": out, "lse": lse} if settings.return_lse else {"out": out}
        of_all = tokens.parted(function, ranks, results) if replicated is not None else (results,)
        to_user = [x for of in of_all for x in _local.results_to_user(of["out"], of.get("lse"), settings, like)]
        if largest is not None:
            to_user.append(like.give(from_host(largest.of_all(ranks), out.sycl_queue)))
    if return_ctx:
        to_user.append(replace(context, parts=tuple(parts)))
    return _local.alone_or_all(to_user)


def check_more(return_max_logit: Any) -> tuple[str, ...]:
    """What more than out and lse is wanted."""
    check_flag("return_max_logit", return_max_logit)
    return ("return_max_logit",) if return_max_logit else ()


def watched(options: Options, geometry: Geometry, wanted: Any) -> tuple[LargestScores | None, Options]:
    """What finds the largest scores, if that is wanted, and the options that carry it."""
    if not wanted:
        return None, options
    largest = LargestScores(geometry.heads, geometry.compute_dtype)
    return largest, replace(options, findings=largest)


def _describe(
    arrays: Sequence[Any],
    geometry: Geometry,
    options: Options,
    course: Course,
    *,
    keep: bool,
    ring: Ring | None = None,
) -> Description:
    """What attention moves and computes: q, k and v there, and out, and lse if it is wanted, back."""
    q, k, v = arrays
    lse_dtype = np.dtype(geometry.compute_dtype)

    def begin() -> tuple[Arrays, Arrays]:
        results = {"out": _local.empty_out(q, options.layout, geometry.head_dim_v)}
        if options.return_lse:
            results["lse"] = empty_like(q, (geometry.batch, geometry.heads, q.shape[1]), lse_dtype)
        return {"q": q, "k": k, "v": v}, results

    def attend(number: int, at_hand: Arrays) -> Arrays:
        """Attention of all rows and the heads of one part; returns what a gradient needs of it."""
        mine, sent = course.shares[number][course.placement.group.rank], at_hand.get("lse")
        shape = geometry.batch, mine.q_count, sum(course.q_rows)
        lse = empty_like(q, shape, lse_dtype) if keep else sent
        heads = HeadMap(geometry.group, mine.shift, mine.q_start)
        if ring is None:
            _local.attend(at_hand["q"], at_hand["k"], at_hand["v"], at_hand["out"], lse, options, heads)
        else:
            ring.running.give(at_hand["out"], lse)
        if keep and sent is not None:
            copy_arrays([as_columns(lse, lse_dtype)], [as_columns(sent, lse_dtype)])
        return {name: at_hand[name] for name in "qkv"} | {"lse": lse} if keep else {}

    return Description("forward", q, geometry.batch, course.lists, begin, attend, keep=keep, ring=ring)
