"""The classes that users of yunchang know, over `ulysses_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._call.checks import Names, check_axes
from ._call.definitions import takes
from ._call.layout import LAYOUTS, PACKED, axes_to_bshd
from ._call.options import CallOptions, LayerOptions
from ._mesh import TokenOptions
from .backends import AttnType, LocalAttention
from .flash_attn import ByPosition, flash_attn

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from ._call.options import Real, Window
    from ._ranks.orders import Order
    from .mesh import RingSize

_CLASS_NAMES = Names("query", "key", "value", comm="sequence_process_group", return_lse="return_attn_probs")
_ORDERS: dict[str, Order] = {"basic": "contiguous", "zigzag": "zigzag", "stripe": "striped", "strip": "striped"}


class LayerKeywords(LayerOptions, TokenOptions, CallOptions, total=False):
    """The options that a call of a layer has besides those of flash-attn."""


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
        ring: RingSize = 1,
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

    @takes(LayerKeywords)
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
        **options: Unpack[LayerKeywords],
    ) -> Any:
        """Attention of the rows of this rank. Collective over the group; see `ulysses_attention` for what is raised.

        Parameters
        ----------
        query, key, value : arrays of one kind, dtype and device
            Rows of this rank, of any kind and dtype that `ulysses_attention` takes; (batch, seq_local, heads, head_dim) unless
            the layer was made with other axes. key and value may have fewer heads, of which the heads of query are a multiple.
            With `cu_seqlens_q` they are packed sequences, (rows, heads, head_dim), which a layer with other axes does not take.
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

        Returns
        -------
        out : same kind, dtype and device as query
            Shape of query, but for the head_dim, which is that of value.
        lse : same kind and device as query
            Only with `return_attn_probs`: (batch, heads, seq_local), or (heads, rows) with `cu_seqlens_q`; followed by None.
        out_r, lse_r : arrays
            Only with `replicated`, after the others: out of its tokens, and with `return_attn_probs` lse, the same on all
            ranks.
        max_logit : same kind and device as query
            Only with `return_max_logit`, as the last result; see `ulysses_attention`.
        """
        packed = options.get("cu_seqlens_q") is not None and self._axes == LAYOUTS["bshd"]
        given = ByPosition(
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
        )
        of_layer = {"attn_type": self.attn_type, "ring": self.ring, "order": self.order, "kv": self.kv}
        how = {"comm": self.sequence_process_group, "layout": PACKED if packed else self._axes, "names": _CLASS_NAMES}
        return flash_attn("UlyssesAttention", (query, key, value), given, **how, **of_layer, **options)


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
    ring : int, Mesh or "auto"
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
        ring: RingSize = "auto",
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
