"""The functions that users of flash-attn know, over `ulysses_attention`: its names, and its order of arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from ._call.checks import Names, check_array
from ._call.definitions import takes
from ._call.layout import PACKED
from ._call.options import CallOptions, MoreOptions
from ._mesh import OrderOptions, RingOptions, TokenOptions
from .attention import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from typing_extensions import Unpack

    from ._call.definitions import Function
    from ._call.options import Real, Window

_NAMES = Names(comm="group", return_lse="return_attn_probs")
_NAMES_OF_QKV = Names("q of qkv", "k of qkv", "v of qkv", *_NAMES[3:])
_NAMES_OF_KV = Names("q", "k of kv", "v of kv", *_NAMES[3:])


class FlashAttnKeywords(MoreOptions, RingOptions, TokenOptions, CallOptions, total=False):
    """The options that the functions have besides those of flash-attn."""


class KvPackedKeywords(MoreOptions, OrderOptions, TokenOptions, CallOptions, total=False):
    """Those of functions in which kv is an array: keys get to other groups by ``kv="ring"``."""


class ByPosition(NamedTuple):
    """The options that flash-attn takes by position, in its order."""

    dropout_p: Real
    softmax_scale: Real | None
    causal: bool | np.bool_
    window_size: Window
    softcap: Real
    alibi_slopes: Any
    deterministic: bool
    return_attn_probs: bool


# what the docstrings say alike
_OPTIONS = """dropout_p : float
    Probability with which a weight is dropped; needs `seed`.
softmax_scale : float, optional
    Factor of the dot products; 1/sqrt(head_dim) by default.
causal : bool
    Query i sees the keys j <= i + seq_k - seq_q.
window_size, softcap, alibi_slopes
    As in `ulysses_attention`.
deterministic : bool
    The result is bit-identical on repetition either way.
return_attn_probs : bool
    Return ``(out, lse, None)``, as flash-attn does without dropout."""
_SAME = """dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    As in `ulysses_flash_attn_func`"""
_GROUP = """group : mpi4py.MPI.Intracomm, optional
    The ranks over which the rows are split; ``MPI.COMM_WORLD`` by default."""
_STARTS = """cu_seqlens_q, cu_seqlens_k : array or sequence of int
    Where the sequences start, from 0 to the number of rows of all ranks; the same on all ranks.
max_seqlen_q, max_seqlen_k : int, optional
    No effect: the lengths say it."""
_RESULTS = """Returns
-------
out : same kind, dtype and device as {like}
    ({rows}, heads, head_dim).
lse : same kind and device as {like}
    Only with `return_attn_probs`: ({of_lse}), followed by None.
out_r, lse_r : arrays
    Only with `replicated`, after the others: out of its tokens, and with `return_attn_probs` lse, the same on all ranks.
max_logit : same kind and device as {like}
    Only with `return_max_logit`, as the last result; see `ulysses_attention`.

Raises
------
TypeError, ValueError, NotImplementedError
    On all ranks, as `ulysses_attention` does."""


def _takes(keywords: type, like: str = "q", *, packed: bool = False) -> Callable[[Function], Function]:
    """`takes` these options, with the texts that the docstrings share."""
    rows, of_lse = ("rows", "heads, rows") if packed else ("batch, seq_local", "batch, heads, seq_local")
    return takes(
        keywords,
        by_position=_OPTIONS,
        same=f"{_SAME}; masks count within a sequence." if packed else f"{_SAME}.",
        group=_GROUP,
        starts=_STARTS,
        results=_RESULTS.format(like=like, rows=rows, of_lse=of_lse),
    )


@_takes(FlashAttnKeywords)
def ulysses_flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: Real = 0.0,
    softmax_scale: Real | None = None,
    causal: bool | np.bool_ = False,
    window_size: Window = (-1, -1),
    softcap: Real = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    group: Any = None,
    **options: Unpack[FlashAttnKeywords],
) -> Any:
    """`ulysses_attention` with the signature of ``flash_attn_func`` (flash-attn 2.6 and later), plus the communicator.

    Collective over `group`.

    Parameters
    ----------
    q, k, v : arrays of one kind, dtype and device
        Rows of this rank, of any kind and dtype that `ulysses_attention` takes, (batch, seq_local, heads, head_dim); k and v
        may have fewer heads.
    {by_position}
    {names}
        As in `ulysses_attention`.
    {group}

    {results}

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import ulysses_flash_attn_func
    >>> q = np.ones((1, 16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> out, lse, _ = ulysses_flash_attn_func(q, q, q, causal=True, return_attn_probs=True)
    >>> out.shape, lse.shape
    ((1, 16, 4, 8), (1, 4, 16))
    """
    given = ByPosition(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn("ulysses_flash_attn_func", (q, k, v), given, comm=group, names=_NAMES, **options)


@_takes(FlashAttnKeywords, packed=True)
def ulysses_flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: SupportsIndex | None = None,
    max_seqlen_k: SupportsIndex | None = None,
    dropout_p: Real = 0.0,
    softmax_scale: Real | None = None,
    causal: bool | np.bool_ = False,
    window_size: Window = (-1, -1),
    softcap: Real = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    group: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    **options: Unpack[FlashAttnKeywords],
) -> Any:
    """`ulysses_attention` of packed sequences with the signature of ``flash_attn_varlen_func`` (flash-attn 2.6 and later).

    Collective over `group`.

    Parameters
    ----------
    q, k, v : arrays of one kind, dtype and device
        Rows of this rank, of any kind and dtype that `ulysses_attention` takes, (rows, heads, head_dim): a part of the rows of
        all sequences, one after the other; k and v may have fewer heads.
    {starts}
    {same}
    {names}
        As in `ulysses_attention`.
    {group}
    seqused_q, seqused_k
        As in `ulysses_attention`.

    {results}

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from ulysses_dp import ulysses_flash_attn_varlen_func
    >>> q = np.ones((16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> starts = [0, 10, 16 * MPI.COMM_WORLD.size]  # of two sequences
    >>> ulysses_flash_attn_varlen_func(q, q, q, starts, starts, causal=True).shape
    (16, 4, 8)
    """
    given = ByPosition(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    packing = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q, "seqused_k": seqused_k}
    how = {"comm": group, "layout": PACKED, "names": _NAMES} | packing
    return flash_attn("ulysses_flash_attn_varlen_func", (q, k, v), given, **how, **options)


@_takes(FlashAttnKeywords, "qkv")
def ulysses_flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: Real = 0.0,
    softmax_scale: Real | None = None,
    causal: bool | np.bool_ = False,
    window_size: Window = (-1, -1),
    softcap: Real = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    group: Any = None,
    **options: Unpack[FlashAttnKeywords],
) -> Any:
    """`ulysses_flash_attn_func` with the signature of ``flash_attn_qkvpacked_func`` (flash-attn 2.6 and later).

    Collective over `group`.

    Parameters
    ----------
    qkv : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries, keys and values of this rank, (batch, seq_local, 3, heads, head_dim); any dtype that `ulysses_attention` takes.
    {same}
    {names}
        As in `ulysses_attention`.
    {group}

    {results}

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import ulysses_flash_attn_qkvpacked_func
    >>> qkv = np.ones((1, 16, 3, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> ulysses_flash_attn_qkvpacked_func(qkv, causal=True).shape
    (1, 16, 4, 8)
    """
    given = ByPosition(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    how = {"comm": group, "names": _NAMES_OF_QKV, "unpack": _parts_of_qkv}
    return flash_attn("ulysses_flash_attn_qkvpacked_func", (qkv,), given, **how, **options)


@_takes(KvPackedKeywords)
def ulysses_flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: Real = 0.0,
    softmax_scale: Real | None = None,
    causal: bool | np.bool_ = False,
    window_size: Window = (-1, -1),
    softcap: Real = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    group: Any = None,
    **options: Unpack[KvPackedKeywords],
) -> Any:
    """`ulysses_flash_attn_func` with the signature of ``flash_attn_kvpacked_func`` (flash-attn 2.6 and later).

    Collective over `group`.

    Parameters
    ----------
    q : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries of this rank, (batch, seq_local, heads, head_dim), of any dtype that `ulysses_attention` takes.
    kv : same kind, dtype and device as q
        Keys and values of this rank, (batch, seq_k_local, 2, kv_heads, head_dim).
    {same}
    {names}
        As in `ulysses_attention`. Keys get to other groups by ``kv='ring'``.
    {group}

    {results}

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import ulysses_flash_attn_kvpacked_func
    >>> q, kv = np.ones((1, 16, 4, 8), dtype=np.float32), np.ones((1, 16, 2, 1, 8), dtype=np.float32)  # 16 rows on every rank
    >>> ulysses_flash_attn_kvpacked_func(q, kv, causal=True).shape
    (1, 16, 4, 8)
    """
    given = ByPosition(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    how = {"comm": group, "names": _NAMES_OF_KV, "unpack": _parts_of_kv}
    return flash_attn("ulysses_flash_attn_kvpacked_func", (q, kv), given, **how, **options)


@_takes(FlashAttnKeywords, "qkv", packed=True)
def ulysses_flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: SupportsIndex | None = None,
    dropout_p: Real = 0.0,
    softmax_scale: Real | None = None,
    causal: bool | np.bool_ = False,
    window_size: Window = (-1, -1),
    softcap: Real = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    group: Any = None,
    seqused: Any = None,
    **options: Unpack[FlashAttnKeywords],
) -> Any:
    """`ulysses_flash_attn_varlen_func` with the signature of ``flash_attn_varlen_qkvpacked_func`` (flash-attn 2.6 and later).

    Collective over `group`.

    Parameters
    ----------
    qkv : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries, keys and values of this rank, (rows, 3, heads, head_dim), of any dtype that `ulysses_attention` takes.
    cu_seqlens : array or sequence of int
        Where the sequences start, from 0 to the number of rows of all ranks; the same on all ranks.
    max_seqlen : int, optional
        No effect: the lengths say it.
    {same}
    {names}
        As in `ulysses_attention`.
    {group}
    seqused : array or sequence of int, optional
        How many rows of each sequence count, as queries and as keys: `seqused_q` and `seqused_k` of `ulysses_attention`.

    {results}

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from ulysses_dp import ulysses_flash_attn_varlen_qkvpacked_func
    >>> qkv = np.ones((16, 3, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> ulysses_flash_attn_varlen_qkvpacked_func(qkv, [0, 10, 16 * MPI.COMM_WORLD.size], causal=True).shape
    (16, 4, 8)
    """
    given = ByPosition(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    packing = {"cu_seqlens_q": cu_seqlens, "seqused_q": seqused, "seqused_k": seqused}
    how = {"comm": group, "layout": PACKED, "names": _NAMES_OF_QKV, "unpack": _parts_of_qkv} | packing
    return flash_attn("ulysses_flash_attn_varlen_qkvpacked_func", (qkv,), given, **how, **options)


@_takes(KvPackedKeywords, packed=True)
def ulysses_flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: SupportsIndex | None = None,
    max_seqlen_k: SupportsIndex | None = None,
    dropout_p: Real = 0.0,
    softmax_scale: Real | None = None,
    causal: bool | np.bool_ = False,
    window_size: Window = (-1, -1),
    softcap: Real = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    group: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    **options: Unpack[KvPackedKeywords],
) -> Any:
    """`ulysses_flash_attn_varlen_func` with the signature of ``flash_attn_varlen_kvpacked_func`` (flash-attn 2.6 and later).

    Collective over `group`.

    Parameters
    ----------
    q : dpnp.ndarray, usm_ndarray, numpy.ndarray, torch.Tensor or array_api_strict.Array
        Queries of this rank, (rows, heads, head_dim), of any dtype that `ulysses_attention` takes.
    kv : same kind, dtype and device as q
        Keys and values of this rank, (rows, 2, kv_heads, head_dim).
    {starts}
    {same}
    {names}
        As in `ulysses_attention`. Keys get to other groups by ``kv='ring'``.
    {group}
    seqused_q, seqused_k
        As in `ulysses_attention`.

    {results}

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from ulysses_dp import ulysses_flash_attn_varlen_kvpacked_func
    >>> q, kv = np.ones((16, 4, 8), dtype=np.float32), np.ones((16, 2, 1, 8), dtype=np.float32)  # 16 rows on every rank
    >>> starts = [0, 10, 16 * MPI.COMM_WORLD.size]  # of two sequences
    >>> ulysses_flash_attn_varlen_kvpacked_func(q, kv, starts, starts, causal=True).shape
    (16, 4, 8)
    """
    given = ByPosition(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    packing = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q, "seqused_k": seqused_k}
    how = {"comm": group, "layout": PACKED, "names": _NAMES_OF_KV, "unpack": _parts_of_kv} | packing
    return flash_attn("ulysses_flash_attn_varlen_kvpacked_func", (q, kv), given, **how, **options)


def flash_attn(function: str, arrays: tuple[Any, ...], given: ByPosition, **options: Any) -> Any:
    """Call `ulysses_attention` under a public name, and return what flash-attn would."""
    of_attention = given._asdict()
    del of_attention["deterministic"]
    with_lse = of_attention.pop("return_attn_probs")
    result = distributed(function, *arrays, return_lse=with_lse, **of_attention, **options)
    return (*result[:2], None, *result[2:]) if with_lse else result


def _parts_of_qkv(qkv: Any, layout: str) -> tuple[Any, Any, Any]:
    q, k, v = _split("qkv", qkv, 3, layout)
    return q, k, v


def _parts_of_kv(q: Any, kv: Any, layout: str) -> tuple[Any, Any, Any]:
    k, v = _split("kv", kv, 2, layout)
    return q, k, v


def _split(name: str, x: Any, count: int, layout: str) -> list[Any]:
    """Views of the arrays that lie on the axis before the heads; checked."""
    shape, axis = check_array(name, x).shape, 1 if layout == PACKED else 2
    if len(shape) != axis + 3 or shape[axis] != count:
        axes = f"({'rows' if layout == PACKED else 'batch, seq'}, {count}, heads, head_dim)"
        raise ValueError(f"{name} must have the {axis + 3} axes {axes}, not shape {shape}")
    return [x[(slice(None),) * axis + (n, ...)] for n in range(count)]
