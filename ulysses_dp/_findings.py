"""What a call finds besides its results by rows: the largest scores, and the gradient of what is added to scores.

The options of a call carry them (`Options.findings`) to wherever some rows meet some keys, in a ring as without one: what they
see there is added to what they have seen. In the end the ranks join theirs, in the order of the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._ranks import mpi
from ._ranks.agree import on_all_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._call.options import Options
    from ._ranks.partition import HeadMap


class LargestScores:
    """The largest score of every head."""

    def __init__(self, heads: int, dtype: Any) -> None:
        self.values = np.full(heads, -np.inf, dtype)

    def see(self, arrays: Sequence[Any], options: Options, heads: HeadMap) -> None:
        """Count the scores of USM arrays (q, k)."""
        mine = slice(heads.first, heads.first + arrays[0].shape[2])
        for batch, of_batch in _batches(options):
            found = of_batch.backend.largest_scores(*(x[batch] for x in arrays), of_batch, heads)
            self.values[mine] = np.maximum(self.values[mine], found)

    def of_all(self, ranks: mpi.Ranks) -> np.ndarray:
        """The largest of all ranks. Collective."""
        values: np.ndarray = mpi.join(ranks, self.values).reshape(ranks.size, -1).max(axis=0)
        return values


class ScoreGradients:
    """The gradient by bias and slopes, of the shapes of what was given for these, as far as it is wanted."""

    def __init__(self, options: Options, dtype: Any, wanted: Sequence[str], bias: Any, slopes: Any) -> None:
        for name, flag, given in (("bias", "bias_grad", bias), ("alibi_slopes", "slopes_grad", slopes)):
            if flag in wanted and given is None:
                raise ValueError(f"{flag} needs {name}, of which it is the gradient")
        self._dtype = dtype
        self._of_slopes = np.shape(slopes) if isinstance(slopes, list | tuple) else getattr(slopes, "shape", ())
        self._totals: dict[str, np.ndarray] = {}
        if "slopes_grad" in wanted and options.alibi_slopes is not None:
            self._totals["slopes"] = np.zeros(options.alibi_slopes.shape)
        if "bias_grad" in wanted and options.bias is not None:
            self._totals["bias"] = np.zeros(options.bias.shape, dtype)

    def see(self, arrays: Sequence[Any], options: Options, heads: HeadMap) -> None:
        """Add what USM arrays (dout, q, k, v, lse, delta) give."""
        mine, block = slice(heads.first, heads.first + arrays[1].shape[2]), options.block
        of_rows, of_keys = (slice(None), slice(None)) if block is None else (block.rows.slice, block.keys.slice)
        for batch, of_batch in _batches(options):
            at_hand, where = [x[batch] for x in arrays], (batch, mine, of_rows, of_keys)
            for name, total in self._totals.items():
                keeps = [n != 1 for n in total.shape] + [False] * (4 - total.ndim)
                found = of_batch.backend.score_gradient(at_hand, of_batch, heads, keeps=keeps, by_slope=name == "slopes")
                places = zip(where, keeps, strict=True)
                part = total[tuple(place if keep else slice(None) for place, keep in places)[: total.ndim]]
                part += found.reshape(part.shape)

    def join(self, ranks: mpi.Ranks, function: str) -> None:
        """Add up what all ranks have. Collective."""
        for name, total in self._totals.items():
            self._totals[name] = _add_up(ranks, function, total)

    def results(self) -> dict[str, np.ndarray]:
        """The gradients by name, of the slopes first."""
        shapes = {"slopes": self._of_slopes}
        return {name: x.astype(self._dtype, copy=False).reshape(shapes.get(name, x.shape)) for name, x in self._totals.items()}


def _batches(options: Options) -> Iterator[tuple[slice, Options]]:
    """The batches that are computed together, and the options for them."""
    if options.differ_by_batch:
        yield from options.by_batch()
    else:
        yield slice(None), options


def _add_up(ranks: mpi.Ranks, function: str, x: np.ndarray) -> np.ndarray:
    if ranks.size == 1:
        return x
    memory = on_all_ranks(ranks, function, lambda: mpi.memory_for_sum(ranks, x))
    return mpi.sum_in_order(ranks, x, memory)
