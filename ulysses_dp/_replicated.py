"""Tokens that every rank has whole, such as a text beside a long image: they count once, as further rows of some ranks.

Every group of a mesh takes its share of them to one of its ranks, before or after the rows of that rank. From there on they are
rows like others, and nothing else of a call knows of them. Of the results, every rank gets all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._call.checks import check_same_device
from ._device.arrays import from_host, tensor, to_host
from ._ranks import mpi
from ._ranks.agree import on_all_ranks
from ._ranks.orders import Rows, count, ends_within, positions, shares_of_replicated

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._call.checks import Geometry
    from ._call.options import Options
    from ._device.arrays import Array
    from ._mesh import Wish
    from ._ranks.orders import Place

ROWS_AXIS = {"lse": 2, "dlse": 2}  # of USM arrays (batch, heads, rows); of others it is 1


class Replicated(NamedTuple):
    """The tokens of a call: of both, queries and keys, how many there are, and the shares of all ranks."""

    place: Place
    counts: tuple[int, int]
    shares: tuple[tuple[Rows, ...], tuple[Rows, ...]]

    @classmethod
    def of(cls, counts: tuple[int, int], ranks: int, wish: Wish, options: Options) -> Replicated:
        """The tokens of a call with so many of them."""
        ends = options.cu_seqlens_q, options.cu_seqlens_k
        shares = []
        for tokens, of_all in zip(counts, ends, strict=True):
            if of_all and of_all[-1] < tokens:
                raise ValueError(f"cu_seqlens must count the {tokens} replicated rows, too, not end with {of_all[-1]}")
            first = of_all[-1] - tokens if of_all and wish.place == "end" else 0
            packed = ends_within(of_all, first, tokens) if wish.order != "contiguous" else None
            shares.append(shares_of_replicated(tokens, ranks, wish.ring, wish.order, wish.place, packed))
        return cls(wish.place, counts, (shares[0], shares[1]))

    def brought(self, rank: int, names: Sequence[str], arrays: Sequence[Any], tokens: Sequence[Any]) -> list[Any]:
        """USM arrays with the share of a rank beside its rows; as they are, if there are no tokens."""
        if not tokens:
            return list(arrays)
        return [self._beside(rank, name, x, y) for name, x, y in zip(names, arrays, tokens, strict=True)]

    def _beside(self, rank: int, name: str, x: Any, tokens: Any) -> Any:
        share, axis = self.shares[_of_keys(name)][rank], ROWS_AXIS.get(name, 1)
        if not share or x is None:
            return x
        of_tokens = [tokens[(slice(None),) * axis + (s.slice,)] for s in share]
        return tensor.concat([*of_tokens, x] if self.place == "start" else [x, *of_tokens], axis=axis)

    def parted(self, function: str, ranks: mpi.Ranks, results: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The results for the rows of this rank, and those for all tokens. Collective."""
        mine, of_share = {}, {}
        for name, x in results.items():
            axis = ROWS_AXIS.get(name, 1)
            size, tokens = x.shape[axis], count(self.shares[_of_keys(name)][ranks.rank])
            cut = tokens if self.place == "start" else size - tokens
            parts = [x[(slice(None),) * axis + (rows,)] for rows in (slice(0, cut), slice(cut, size))]
            of_share[name], rest = parts if self.place == "start" else parts[::-1]
            mine[name] = tensor.copy(rest, order="C") if name == "lse" else rest  # the others are laid out for users later
        on_host = on_all_ranks(ranks, function, lambda: {name: to_host(x) for name, x in of_share.items()})
        whole = {name: self._joined(ranks, name, x) for name, x in on_host.items()}
        queue = next(iter(results.values())).sycl_queue
        return mine, on_all_ranks(ranks, function, lambda: {name: from_host(x, queue) for name, x in whole.items()})

    def _joined(self, ranks: mpi.Ranks, name: str, share: np.ndarray) -> np.ndarray:
        """All tokens, of the shares of the ranks."""
        axis, shares = ROWS_AXIS.get(name, 1), self.shares[_of_keys(name)]
        joined = mpi.join_rows(ranks, np.moveaxis(share, axis, 0), tuple(map(count, shares)))
        whole = np.empty_like(joined)
        whole[np.concatenate([positions(rows) for rows in shares])] = joined
        return np.ascontiguousarray(np.moveaxis(whole, 0, axis))


def _of_keys(name: str) -> bool:
    return name in ("k", "v", "dk", "dv")


def check_replicated(
    replicated: Any,
    names: Sequence[str],
    check: Callable[..., tuple[tuple[Array, ...], Geometry]],
    like: Array,
    geometry: Geometry,
) -> tuple[Array, ...]:
    """Check the tokens: arrays of these names, in their places, checked as those of the rows are, and fitting them."""
    if not isinstance(replicated, tuple | list):
        raise TypeError(f"replicated must be a tuple of {', '.join(names)}, not {type(replicated).__name__}")
    if len(replicated) != len(names):
        raise ValueError(f"replicated must be the {len(names)} arrays {', '.join(names)}, not {len(replicated)}")
    try:
        arrays, its = check(*replicated)
        if arrays[0].library is not like.library:
            raise TypeError(f"its arrays must be of the kind of q, {like.library.name}, not {arrays[0].library.name}")
        check_same_device(("q", "q of these"), (like, arrays[0]))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"replicated: {error}") from error
    for name, given in vars(its).items():
        if given != (expected := getattr(geometry, name)):
            raise (TypeError if name == "dtype" else ValueError)(
                f"replicated must have the {name} of the other arrays, {expected}, not {given}"
            )
    return arrays
