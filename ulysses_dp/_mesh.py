"""How the ranks of a call share the work: what users may say of it, and which rank then holds what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, SupportsIndex, TypedDict, cast

from ulysses_dp.kernels.panel_wire import LARGEST as WIRES

from ._call.checks import check_exchange, check_node_size, check_overlap, shared_or_not
from ._call.definitions import Option, options_of
from ._device.dtypes import DTYPES
from ._local import LocalOptions
from ._ranks.orders import ORDERS, PLACES, Order, Place, Rows, count, ends_within, rows_of_ranks, with_shares
from ._ranks.partition import column, kv_heads_are_shared, part_heads, share_heads
from .mesh import RingSize, check_ring

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ._call.checks import Geometry
    from ._call.options import Options
    from ._ranks import mpi
    from ._ranks.partition import Heads

KVS = ("ring", "all_gather")  # how keys get to the rows of other groups


def _checked_together(name: str, value: Any, call: Any) -> Any:
    """What `check_mesh` checks."""
    return value


class OrderOptions(TypedDict, total=False):
    """How many groups of ranks there are, and which rows they hold."""

    ring: Annotated[
        RingSize,
        Option(
            1,
            _checked_together,
            'int, Mesh or "auto"',
            "If more than 1, the ranks are a mesh: `ring` groups of consecutive ranks. The ranks of a group share the heads, "
            "as without a ring; the keys of every group travel from group to group, and partial results are merged. So there "
            'may be more ranks than heads. It divides the number of ranks. "auto": the smallest with which all ranks have as '
            "many heads. A `Mesh` that was made before has the ranks, too: `comm` need not be given.",
        ),
    ]
    order: Annotated[
        Order,
        Option(
            "contiguous",
            _checked_together,
            '{"contiguous", "zigzag", "zigzag_ranks", "striped"}',
            "Which rows every rank holds: see `row_positions`. With a causal mask all but the first load the groups alike.",
        ),
    ]


class RingOptions(OrderOptions, total=False):
    """The same, and how keys get to other groups."""

    kv: Annotated[
        str,
        Option(
            "ring",
            _checked_together,
            '{"ring", "all_gather", "auto"}',
            'How keys and values get to other groups. "ring": from each group to the next; there is memory for those of two '
            'groups. "all_gather": straight to all groups with rows that see them, and all are kept; nothing is sent on, so it '
            'never sends more. "auto" gathers where the keys of all groups take no more memory than those of two, or than q '
            "and out.",
        ),
    ]


class TokenOptions(TypedDict, total=False):
    """Tokens that every rank has whole, in functions by the names of other packages."""

    replicated: Annotated[
        tuple[Any, Any, Any] | None,
        Option(None, _checked_together, "tuple of q_r, k_r and v_r, optional", "Tokens that every rank has whole."),
    ]
    replicated_at: Annotated[
        Place,
        Option(
            "start",
            _checked_together,
            '{"start", "end"}',
            "Whether these tokens come before the rows of the ranks or after them.",
        ),
    ]


class ExchangeOptions(TypedDict, total=False):
    """How what ranks send each other travels."""

    exchange: Annotated[
        str,
        Option(
            "auto",
            _checked_together,
            '{"auto", "device", "host", "shared"}',
            'Give MPI the device pointers, or copy through pinned host memory; "auto" finds out what MPI supports. "shared" is '
            "for CPU devices of one node: ranks write and read in memory that they share, and wait for each other instead of "
            "sending.",
        ),
    ]
    overlap: Annotated[
        SupportsIndex | str,
        Option(
            "auto",
            _checked_together,
            'int or "auto"',
            "Into how many parts the kv heads of every rank, with their query heads, are divided: while one part is computed, "
            "others travel. The result is the same, the messages are more and smaller. It helps only where the MPI library "
            'moves data without being called. "auto" does not divide: nothing has been measured yet that would be faster for '
            "it.",
        ),
    ]
    node_size: Annotated[
        SupportsIndex | str,
        Option(
            1,
            _checked_together,
            'int or "auto"',
            "If more than 1, exchange in two steps: within nodes of so many consecutive ranks, then between nodes. Every "
            "number travels twice, but a rank sends ``node_size + P / node_size - 2`` messages instead of ``P - 1``: for many "
            'ranks and short sequences (`plan` tells). "auto": the ranks that share memory, or 1 if these are not consecutive '
            "and as many on every node.",
        ),
    ]
    wire_dtype: Annotated[
        str | None,
        Option(
            None,
            _checked_together,
            '{None, "int8", "float8_e4m3"}',
            "Let float32, float16 and bfloat16 arrays travel as 8 bits for each number and a scale for each row and head: a "
            "half or a quarter of the bytes, and a result that is rounded so, the same for any number of ranks but one. "
            "Infinities and nan arrive as what they are. lse is not rounded, and nothing is on one rank.",
        ),
    ]


class MeshOptions(ExchangeOptions, RingOptions, total=False):
    """The options that say how ranks work together; what a call computes does not depend on them."""


class UlyssesOptions(LocalOptions, MeshOptions, total=False):
    """All options of `ulysses_attention`."""


class Wish(NamedTuple):
    """What a user has said of the mesh, checked."""

    exchange: str
    overlap: int
    node_size: Any  # an integer, or "auto"
    ring: int
    order: Order
    kv: str
    place: Place  # of replicated tokens
    wire: str | None  # as what arrays travel, if not as they are

    def common(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {
            "overlap": self.overlap,
            "node_size": self.node_size,
            "ring, order, kv and replicated_at": (self.ring, self.order, self.kv, self.place),
            "exchange": shared_or_not(self.exchange),
            "wire_dtype": self.wire,
        }


class Placement(NamedTuple):
    """The ranks of a call as rings of Ulysses groups, and who holds what."""

    ranks: mpi.Ranks
    group: mpi.Ranks  # those that share the heads of this rank's rows
    ring: int  # how many groups there are
    kv: str  # how keys get to other groups
    rows: tuple[Rows, ...]  # of every rank
    keys: tuple[Rows, ...]

    @classmethod
    def of(
        cls,
        function: str,
        ranks: mpi.Ranks,
        wish: Wish,
        counts: Sequence[tuple[int, ...]],
        options: Options,
        shares: Sequence[tuple[Rows, ...]],
    ) -> Placement:
        """That of a call whose ranks have so many rows and keys; raises, on all ranks alike, if these do not fit the order.

        Among them are the shares of replicated tokens. Collective for the first time.
        """
        ring, order, place = wish.ring, wish.order, wish.place
        packed = (None, None) if order == "contiguous" else (options.cu_seqlens_q, options.cu_seqlens_k)
        held = []
        for name, of_all, ends, of_tokens in zip("qk", counts, packed, shares, strict=True):
            tokens = tuple(map(count, of_tokens))
            given = tuple(rows - n for rows, n in zip(of_all, tokens, strict=True))
            fixed = given if order == "contiguous" else None
            within = ends_within(ends, sum(tokens) if place == "start" else 0, sum(given))
            rows = rows_of_ranks(sum(given), ranks.size, ring, order, within, fixed)
            check_rows(function, name, given, tuple(map(count, rows)), order, ring)
            held.append(with_shares(rows, of_tokens, place))
        return cls(ranks, ranks if ring == 1 else ranks.mesh(ring)[0], ring, wish.kv, *held)

    def of_group(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """The values of the ranks of this group, of those of all."""
        first = self.ranks.rank - self.group.rank
        return values[first : first + self.group.size]


class Course(NamedTuple):
    """What a call does that follows from its options and from the rows of all ranks."""

    placement: Placement
    heads: Heads  # of this rank
    shares: list[tuple[Heads, ...]]  # of the ranks of the group, in parts
    q_rows: tuple[int, ...]  # of the ranks of the group
    k_rows: tuple[int, ...]
    lists: list[Any]  # what travels for every part

    @classmethod
    def of(
        cls,
        function: str,
        ranks: mpi.Ranks,
        wish: Wish,
        sizes: Sequence[tuple[int, ...]],
        geometry: Geometry,
        options: Options,
        tokens: Sequence[tuple[Rows, ...]],
        *,
        parts: Callable[[bool], int],
        travels: Callable[..., Any],
    ) -> Course | None:
        """The course of a call whose ranks have arrays of these sizes, or None on one rank, where nothing travels.

        How many parts it has may depend on whether several ranks read one kv head; `tokens` are the shares of replicated ones.
        Raises, on all ranks alike, if the sizes do not fit the options or the order of rows. Collective for the first time.
        """
        counts = column(sizes, 0), column(sizes, 1)
        options.check_lengths(function, *map(sum, counts))
        if ranks.size == 1:
            return None
        placement = Placement.of(function, ranks, wish, counts, options, tokens)
        heads = share_heads(geometry.heads, geometry.kv_heads, placement.group.size)
        shares = part_heads(heads, geometry.group, parts(kv_heads_are_shared(heads)))
        q_rows, k_rows = map(placement.of_group, counts)
        lists = [travels(share, q_rows, k_rows) for share in shares]
        return cls(placement, heads[placement.group.rank], shares, q_rows, k_rows, lists)


def check_mesh(options: Mapping[str, Any], replicated_at: Any, ranks: mpi.Ranks, geometry: Geometry, settings: Options) -> Wish:
    """Check the options of a mesh, of which the defaults are filled in, and where replicated tokens are."""
    given = {name: options.get(name, option.default) for name, option in options_of(MeshOptions).items()}
    overlap, node_size = check_overlap(given["overlap"]), check_node_size(given["node_size"], ranks.size)
    ring, order = check_ring(given["ring"], ranks, geometry.heads), check_order(given["order"])
    if ring > 1 or order != "contiguous":
        if overlap > 1:
            raise ValueError(f"overlap must be 1 or 'auto' with a ring or an order of rows, not {overlap}")
        if node_size != 1:
            raise ValueError(f"node_size must be 1 with a ring or an order of rows, not {node_size!r}")
        if not settings.backend.in_blocks:
            settings.backend.refuse("a ring or an order of rows")
    kv, place = check_kv(given["kv"], ring, geometry.heads, geometry.kv_heads), check_place(replicated_at)
    exchange = check_exchange(given["exchange"])
    wire = check_wire(given["wire_dtype"], geometry.dtype, ring, exchange)
    return Wish(exchange, overlap, node_size, ring, order, kv, place, wire)


def check_wire(wire: Any, dtype: str, ring: int, exchange: str = "auto") -> str | None:
    """Check as what arrays of a dtype are to travel; returns it."""
    if wire is None:
        return None
    if not isinstance(wire, str):
        raise TypeError(f"wire_dtype must be a string or None, not {type(wire).__name__}")
    if wire not in WIRES:
        raise ValueError(f"wire_dtype must be one of {' and '.join(WIRES)}, or None, not {wire!r}")
    if DTYPES[dtype].itemsize > 4:
        raise NotImplementedError(f"wire_dtype is not supported for {dtype}; float32, float16 and bfloat16 have it")
    if exchange == "shared":
        raise NotImplementedError("wire_dtype is not supported with exchange='shared'; 'auto', 'device' and 'host' have it")
    if ring > 1:
        raise NotImplementedError(f"wire_dtype is not supported with ring={ring}; ring=1 has it")
    return wire


def check_kv(kv: Any, ring: int, heads: int, kv_heads: int) -> str:
    """Check how keys are to get to other groups.

    "auto" gathers them, which never sends more, where they take no more memory than in a ring, or than q and out.
    """
    if not isinstance(kv, str):
        raise TypeError(f"kv must be a string, not {type(kv).__name__}")
    if kv == "auto":
        return "all_gather" if ring * kv_heads <= max(2 * kv_heads, heads) else "ring"
    if kv not in KVS:
        raise ValueError(f"kv must be one of {', '.join(KVS)} and auto, not {kv!r}")
    return kv


def check_rows(function: str, name: str, given: tuple[int, ...], expected: tuple[int, ...], order: Order, ring: int) -> None:
    """Check the rows that the ranks have of an array against those of their order; all ranks know these, and raise alike."""
    for rank, (mine, fitting) in enumerate(zip(given, expected, strict=True)):
        if mine != fitting:
            raise ValueError(
                f"{function}: with order {order!r} and ring {ring}, {name} must have {fitting} of the {sum(given)} rows on "
                f"rank {rank}, not {mine}; see row_positions"
            )


def check_place(place: Any) -> Place:
    """Check where replicated tokens are; returns it."""
    if not isinstance(place, str):
        raise TypeError(f"replicated_at must be a string, not {type(place).__name__}")
    if place not in PLACES:
        raise ValueError(f"replicated_at must be one of {' and '.join(PLACES)}, not {place!r}")
    return cast("Place", place)


def check_order(order: Any) -> Order:
    """Check the name of an order of rows; returns it."""
    if not isinstance(order, str):
        raise TypeError(f"order must be a string, not {type(order).__name__}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    return cast("Order", order)
