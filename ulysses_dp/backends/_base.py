"""What every local attention backend can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ulysses_dp.kernels.row_dot import dot_rows

from .._device.copies import readable

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import ClassVar, NoReturn

    from .._call.checks import Geometry
    from .._call.options import Options
    from .._device.arrays import Array
    from .._ranks.partition import HeadMap


class Backend:
    """Attention of one rank on USM arrays, (batch, seq, heads, head_dim) with any strides.

    bfloat16 numbers come in uint16 arrays, as the dtype of the `Geometry` tells. lse and delta are (batch, heads, seq_q) in the
    dtype of the computation. The options hold numbers for all heads, of which these are the ones that a `HeadMap` tells. There
    is at least one query row; there may be no key.
    """

    in_blocks = False  #: whether it takes options for some rows and keys of a call, as a ring meets them
    name: str  #: of the member of AttnType, or of the user's function
    has: ClassVar[Collection[str]] = ()  #: the options that it has, by their public names, and what more of gradients
    _declared: ClassVar[list[type[Backend]]] = []

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Backend._declared.append(cls)

    def __str__(self) -> str:
        return self.name

    def for_call(
        self, q: Array, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()
    ) -> Backend:
        """The backend of a call, checked: this one, if it need not know the user's q or leave the call to another.

        `more` names what a gradient takes or gives besides dout, dq, dk, dv and dsinks.
        """
        self.check(device, geometry, options, backward=backward, more=more)
        return self

    def check(self, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()) -> None:
        """Raise NotImplementedError for what this backend does not do, before anything is sent. Not collective.

        ImportError where a package is missing.
        """
        for name in (*options.given, *more):
            if name not in self.has:
                self.refuse(name, next(backend.name for backend in self._declared if name in backend.has))

    def refuse(self, what: str, alternative: str = "INTEL_SYCL") -> NoReturn:
        """Say that there is no such thing here, and where there is."""
        raise NotImplementedError(f"attn_type {self.name} does not support {what}; {alternative} does")

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        """Write `out`, which is dense in the last axis, and `lse`, which is None if nobody wants it."""
        raise NotImplementedError

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        """Write `grads`, (dq, dk, dv), dense in the last axis; `arrays` are (dout, q, k, v, lse, delta)."""
        raise NotImplementedError

    def largest_scores(self, q: Any, k: Any, options: Options, heads: HeadMap) -> np.ndarray:
        """The largest score of every head that is at hand, -inf where there is none; on the host."""
        raise NotImplementedError

    def score_gradient(
        self, arrays: Sequence[Any], options: Options, heads: HeadMap, *, keeps: Sequence[bool], by_slope: bool
    ) -> np.ndarray:
        """The gradient of what is added to scores, by the `arrays` of `backward`; on the host.

        It is (batch, heads, seq_q, seq_k), of which the axes that are not kept are added up to one; `by_slope`, of it times
        what a slope is multiplied with.
        """
        raise NotImplementedError

    def delta(self, dout: Any, out: Any, delta: Any) -> None:
        """Write the sum of dout * out of every query row."""
        dout, out = readable((dout, out), "dout, out", delta.dtype, by_head=False)
        dot_rows(dout, out, delta)


def compute_dtype(x: Any) -> np.dtype:
    """In which dtype attention of such a USM array computes, but where a backend says otherwise, and gives lse."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
