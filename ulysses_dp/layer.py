"""The classes and functions that users of yunchang and flash-attn know, over `ulysses_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

from ._call.checks import Names, check_axes
from ._call.definitions import takes
from ._call.layout import PACKED, axes_to_bshd
from ._call.options import MoreOptions
from .attention import distributed
from .backends import AttnType, LocalAttention

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from ._call.options import Real, Window
    from ._ranks.orders import Order

_CLASS_NAMES = Names("query", "key", "value", comm="sequence_process_group", return_lse="return_attn_probs")
_ORDERS: dict[str, Order] = {"basic": "contiguous", "zigzag": "zigzag", "stripe": "striped", "strip": "striped"}
_FUNCTION_NAMES = Names(comm="group", return_lse="return_attn_probs")


class UlyssesAttention:
    """Sequence-parallel attention with the options fixed once; the signature of ``UlyssesAttention`` in yunchang.

    Parameters
    ----------
    sequence_process_group : mpi4py.MPI.Intracomm, optional
        The ranks over which the sequence is split; ``MPI.COMM_WORLD`` by default.
    scatter_idx, gather_idx : int
        Which axes of the arrays are the heads and the sequence; the first of the other two is the batch. The default is
        (batch, seq, heads, head_dim); ``scatter_idx=1, gather_idx=2`` is (batch, heads, seq, head_dim).
    use_sync : bool
        Return only when the result is complete. It always is.
    attn_type : AttnType, UserAttention or callable
        The implementation of the local attention: a member of `AttnType`, what `register_attention` returned, or a function
        as it takes one.
    ring, order, kv
        As in `ulysses_attention`.

    Raises
    ------
    TypeError, ValueError
        `scatter_idx` and `gather_idx` are not two different axes of a 4-D array.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import UlyssesAttention
    >>> layer = UlyssesAttention()
    >>> q = np.ones((1, 16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> layer(q, q, q, causal=True).shape
    (1, 16, 4, 8)
    """

    def __init__(
        self,
        sequence_process_group: Any = None,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        use_sync: bool = False,
        attn_type: LocalAttention = AttnType.INTEL_SYCL,
        *,
        ring: SupportsIndex | str = 1,
        order: Order = "contiguous",
        kv: str = "ring",
    ) -> None:
        heads, seq = check_axes(scatter_idx=scatter_idx, gather_idx=gather_idx)
        self.sequence_process_group = sequence_process_group
        self.scatter_idx = scatter_idx
        self.gather_idx = gather_idx
        self.use_sync = use_sync
        self.attn_type = attn_type
        self.ring = ring
        self.order = order
        self.kv = kv
        self._axes = axes_to_bshd(heads, seq)

    @takes(MoreOptions)
    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        dropout_p: Real = 0.0,
        softmax_scale: Real | None = None,
        causal: bool | np.bool_ = False,
        window_size: Window = (-1, -1),
        softcap: Real = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        *,
        dtype: str | None = None,
        **options: Unpack[MoreOptions],
    ) -> Any:
        """Attention of the rows of this rank. Collective over the group; see `ulysses_attention` for what is raised.

        Parameters
        ----------
        query, key, value : arrays of one kind, dtype and device
            Rows of this rank, of any kind and dtype that `ulysses_attention` takes; (batch, seq_local, heads, head_dim) unless
            the layer was made with other axes. key and value may have fewer heads, of which the heads of query are a multiple.
        dropout_p : float
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
            Return ``(out, lse, None)``, as flash-attn does without dropout.
        {names}, dtype
            As in `ulysses_attention`.

        Returns
        -------
        out : same kind, dtype and device as query
            Shape of query.
        lse : same kind and device as query
            Only with `return_attn_probs`: (batch, heads, seq_local), followed by None.
        """
        return _flash_attn(
            "UlyssesAttention",
            query,
            key,
            value,
            return_attn_probs,
            comm=self.sequence_process_group,
            layout=self._axes,
            dtype=dtype,
            names=_CLASS_NAMES,
            attn_type=self.attn_type,
            ring=self.ring,
            order=self.order,
            kv=self.kv,
            dropout_p=dropout_p,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            **options,
        )


class LongContextAttention(UlyssesAttention):
    """Ulysses and ring attention together; the signature of ``LongContextAttention`` in yunchang, without its global groups.

    Called as `UlyssesAttention` is, collective over the ranks. In yunchang the degrees of both are set once for a process. Here
    they belong to the layer.

    Parameters
    ----------
    scatter_idx, gather_idx : int
        As in `UlyssesAttention`.
    ring_impl_type : {"basic", "zigzag", "stripe", "strip"}
        Which rows every rank holds: "contiguous", "zigzag" or "striped" of `ulysses_attention`.
    use_pack_qkv : bool
        Send q, k and v in one message. They always are, if they have as many rows.
    use_sync : bool
        Return only when the result is complete. It always is.
    attn_type : AttnType, UserAttention or callable
        As in `UlyssesAttention`.
    sequence_process_group : mpi4py.MPI.Intracomm, optional
        The ranks over which the sequence is split; ``MPI.COMM_WORLD`` by default.
    ring : int or "auto"
        How many groups there are; yunchang's ``ring_degree``.
    kv : {"ring", "all_gather", "auto"}
        As in `ulysses_attention`.

    Raises
    ------
    TypeError, ValueError
        `scatter_idx` and `gather_idx` are not two different axes of a 4-D array, or `ring_impl_type` is none of these.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import LongContextAttention
    >>> layer = LongContextAttention(ring_impl_type="zigzag")
    >>> q = np.ones((1, 16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> layer(q, q, q, causal=True).shape
    (1, 16, 4, 8)
    """

    def __init__(
        self,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_pack_qkv: bool = False,
        use_sync: bool = False,
        attn_type: LocalAttention = AttnType.INTEL_SYCL,
        *,
        sequence_process_group: Any = None,
        ring: SupportsIndex | str = "auto",
        kv: str = "ring",
    ) -> None:
        if not isinstance(ring_impl_type, str):
            raise TypeError(f"ring_impl_type must be a string, not {type(ring_impl_type).__name__}")
        if ring_impl_type not in _ORDERS:
            raise ValueError(f"ring_impl_type must be one of {', '.join(_ORDERS)}, not {ring_impl_type!r}")
        order = _ORDERS[ring_impl_type]
        super().__init__(sequence_process_group, scatter_idx, gather_idx, use_sync, attn_type, ring=ring, order=order, kv=kv)
        self.use_pack_qkv = use_pack_qkv
        self.ring_impl_type = ring_impl_type


@takes(MoreOptions)
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
    ring: SupportsIndex | str = 1,
    order: Order = "contiguous",
    kv: str = "ring",
    dtype: str | None = None,
    **options: Unpack[MoreOptions],
) -> Any:
    """`ulysses_attention` with the signature of ``flash_attn_func`` (flash-attn 2.6 and later), plus the communicator.

    Collective over `group`.

    Parameters
    ----------
    q, k, v : arrays of one kind, dtype and device
        Rows of this rank, of any kind and dtype that `ulysses_attention` takes, (batch, seq_local, heads, head_dim); k and v
        may have fewer heads.
    dropout_p : float
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
        Return ``(out, lse, None)``, as flash-attn does without dropout.
    {names}
        As in `ulysses_attention`.
    group : mpi4py.MPI.Intracomm, optional
        The ranks over which the sequence is split; ``MPI.COMM_WORLD`` by default.
    ring, order, kv, dtype
        As in `ulysses_attention`.

    Returns
    -------
    out : same kind, dtype and device as q
        (batch, seq_local, heads, head_dim).
    lse : same kind and device as q
        Only with `return_attn_probs`: (batch, heads, seq_local), followed by None.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        On all ranks, as `ulysses_attention` does.

    Examples
    --------
    >>> import numpy as np
    >>> from ulysses_dp import ulysses_flash_attn_func
    >>> q = np.ones((1, 16, 4, 8), dtype=np.float32)  # 16 rows on every rank
    >>> out, lse, _ = ulysses_flash_attn_func(q, q, q, causal=True, return_attn_probs=True)
    >>> out.shape, lse.shape
    ((1, 16, 4, 8), (1, 4, 16))
    """
    return _flash_attn(
        "ulysses_flash_attn_func",
        q,
        k,
        v,
        return_attn_probs,
        comm=group,
        layout="bshd",
        ring=ring,
        order=order,
        kv=kv,
        dtype=dtype,
        names=_FUNCTION_NAMES,
        attn_type=AttnType.INTEL_SYCL,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        **options,
    )


@takes(MoreOptions)
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
    ring: SupportsIndex | str = 1,
    order: Order = "contiguous",
    kv: str = "ring",
    dtype: str | None = None,
    **options: Unpack[MoreOptions],
) -> Any:
    """`ulysses_attention` of packed sequences with the signature of ``flash_attn_varlen_func`` (flash-attn 2.6 and later).

    Collective over `group`.

    Parameters
    ----------
    q, k, v : arrays of one kind, dtype and device
        Rows of this rank, of any kind and dtype that `ulysses_attention` takes, (rows, heads, head_dim): a part of the rows of
        all sequences, one after the other; k and v may have fewer heads.
    cu_seqlens_q, cu_seqlens_k : array or sequence of int
        Where the sequences start, from 0 to the number of rows of all ranks; the same on all ranks.
    max_seqlen_q, max_seqlen_k : int, optional
        No effect: the lengths say it.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        As in `ulysses_flash_attn_func`; masks count within a sequence.
    {names}
        As in `ulysses_attention`.
    group : mpi4py.MPI.Intracomm, optional
        The ranks over which the rows are split; ``MPI.COMM_WORLD`` by default.
    seqused_q, seqused_k, ring, order, kv, dtype
        As in `ulysses_attention`.

    Returns
    -------
    out : same kind, dtype and device as q
        (rows, heads, head_dim).
    lse : same kind and device as q
        Only with `return_attn_probs`: (heads, rows), followed by None.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        On all ranks, as `ulysses_attention` does.

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
    return _flash_attn(
        "ulysses_flash_attn_varlen_func",
        q,
        k,
        v,
        return_attn_probs,
        comm=group,
        layout=PACKED,
        ring=ring,
        order=order,
        kv=kv,
        dtype=dtype,
        names=_FUNCTION_NAMES,
        attn_type=AttnType.INTEL_SYCL,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        **options,
    )


def _flash_attn(function: str, q: Any, k: Any, v: Any, return_attn_probs: bool, **options: Any) -> Any:
    """Call, and return what flash-attn would."""
    result = distributed(function, q, k, v, return_lse=return_attn_probs, **options)
    return (*result, None) if return_attn_probs else result
