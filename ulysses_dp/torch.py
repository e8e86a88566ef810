"""Attention as an operation of PyTorch: its autograd differentiates it, and its compiler takes it as it is.

A module of its own, which ``import ulysses_dp`` does not import: PyTorch is an optional requirement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._call.definitions import options_of, takes
from ._call.layout import lse_shape, out_shape
from ._local import LocalOptions, alone_or_all
from ._mesh import MeshOptions, UlyssesOptions
from .attention import attention as _attention
from .attention import ulysses_attention as _ulysses_attention
from .backward import ARRAYS, DIFFERENTIABLE, ON_DEMAND, attention_backward, ulysses_attention_backward

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Unpack


__all__ = ["attention", "ulysses_attention"]

_WAYS = tuple(options_of(MeshOptions))  # how ranks work together; the compiler warns of what is cached, as that function is


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
    """`ulysses_dp.attention` of tensors, with a gradient for q, k, v, `sinks`, `alibi_slopes` and `bias`.

    Not collective.

    Parameters
    ----------
    q, k, v : torch.Tensor
        As `ulysses_dp.attention` takes them, on the CPU or an XPU; they may require a gradient.
    {names}
        As in `ulysses_dp.attention`. `sinks`, `alibi_slopes` and `bias` may be tensors that require a gradient.
    return_lse : bool
        Also return the logarithm of the softmax denominators, by which there is a gradient, too.
    return_max_logit : bool
        Also return the largest score of every head, by which there is no gradient.

    Returns
    -------
    out : torch.Tensor
        What `ulysses_dp.attention` returns, as a part of the graph of autograd.
    lse : torch.Tensor
        Only with `return_lse`.
    max_logit : torch.Tensor
        Only with `return_max_logit`, as the last result.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ImportError
        As `ulysses_dp.attention` does; and in the backward pass, if a gradient of the gradient is wanted.

    Examples
    --------
    >>> import torch
    >>> from ulysses_dp.torch import attention
    >>> q = torch.ones(1, 16, 4, 8, requires_grad=True)
    >>> attention(q, q, q, causal=True).sum().backward()
    >>> q.grad.shape
    torch.Size([1, 16, 4, 8])
    """
    return _run("attention", (q, k, v), {}, options, return_lse, return_max_logit)


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
    **options: Unpack[UlyssesOptions],
) -> Any:
    """`ulysses_dp.ulysses_attention` of tensors, with a gradient for q, k, v, `sinks`, `alibi_slopes` and `bias`.

    Collective over `comm`, and so is its part of the backward pass: every rank has to come by there for the same calls in the
    same order. The gradient is that of the sum of the losses of all ranks. Tensors require gradients on all ranks alike.

    Parameters
    ----------
    q, k, v : torch.Tensor
        The rows of this rank, as `ulysses_dp.ulysses_attention` takes them, on the CPU or an XPU; they may require a gradient.
    {names}
        As in `ulysses_dp.ulysses_attention`. `sinks`, `alibi_slopes` and `bias` may be tensors that require a gradient, on all
        ranks alike, which is that of all ranks, the same on each.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    return_lse : bool
        Also return the logarithm of the softmax denominators, by which there is a gradient, too.
    return_max_logit : bool
        Also return the largest score of every head, by which there is no gradient.
    {more names}
        As in `ulysses_dp.ulysses_attention`.

    Returns
    -------
    out : torch.Tensor
        What `ulysses_dp.ulysses_attention` returns, as a part of the graph of autograd.
    lse : torch.Tensor
        Only with `return_lse`.
    max_logit : torch.Tensor
        Only with `return_max_logit`, as the last result.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ImportError
        On all ranks, as `ulysses_dp.ulysses_attention` does; and in the backward pass, if a gradient of the gradient is wanted.

    Notes
    -----
    What `ulysses_dp.ulysses_attention` keeps for the gradient (`return_ctx`) is kept until the graph is gone. In what
    ``torch.compile`` compiles it is one operator that nothing breaks apart or reorders; there, q, k and v are sent again for
    the gradient.

    Examples
    --------
    >>> import torch
    >>> from ulysses_dp.torch import ulysses_attention
    >>> q = torch.ones(1, 16, 4, 8, requires_grad=True)  # 16 rows on every rank
    >>> ulysses_attention(q, q, q, causal=True).sum().backward()
    >>> q.grad.shape
    torch.Size([1, 16, 4, 8])
    """
    ways = {name: x for name, x in options.items() if name in _WAYS}
    of_attention = {name: x for name, x in options.items() if name not in _WAYS}
    return _run("ulysses_attention", (q, k, v), {"comm": comm} | ways, of_attention, return_lse, return_max_logit)


@dataclass(frozen=True)
class _Call:
    """A call without its tensors."""

    function: str
    names: tuple[str, ...]  # of the tensors: q, k, v and options
    how: dict[str, Any]  # it is computed
    options: dict[str, Any]  # that are no tensors
    wanted: tuple[str, ...]  # of the options whose gradient is computed on demand, those that have one
    return_max_logit: bool

    def differentiates(self, name: str) -> bool:
        """Whether a tensor of this name gets a gradient."""
        return name in DIFFERENTIABLE and (name not in ON_DEMAND or name in self.wanted)

    def forward(self, tensors: Sequence[Any], **wishes: Any) -> tuple[Any, ...]:
        """The results for these tensors, of which those that get a gradient have none that is recorded in here."""
        q, k, v, *others = (
            x.detach() if name in DIFFERENTIABLE and isinstance(x, torch.Tensor) else x
            for name, x in zip(self.names, tensors, strict=True)
        )
        function = _ulysses_attention if self.function == "ulysses_attention" else _attention
        wishes["return_max_logit"] = self.return_max_logit
        return function(q, k, v, **wishes, **self.how, **self._all_options(others))

    def backward(self, dout: Any, dlse: Any, tensors: Sequence[Any], out: Any, lse: Any, kept: Any = None) -> list[Any]:
        """The gradients, in the order of the tensors; without dout, or dlse, the loss does not depend on that result."""
        q, k, v, *others = tensors
        dout = torch.zeros_like(out) if dout is None else dout
        options = self._all_options(others)
        sinks = options.get("sinks")
        on_demand: dict[str, Any] = {ON_DEMAND[name]: True for name in self.wanted}
        if self.function == "ulysses_attention":
            options = self.how | ({"ctx": kept} if kept else options)
            gradients = ulysses_attention_backward(dout, q, k, v, out, lse, dlse=dlse, **on_demand, **options)
        else:
            gradients = attention_backward(dout, q, k, v, out, lse, dlse=dlse, **on_demand, **options)
        given = dict.fromkeys(ARRAYS) | ({} if sinks is None else {"sinks": None}) | dict.fromkeys(self.wanted)
        by_name = dict(zip(given, gradients, strict=True))
        return [
            by_name[name].to(x.dtype) if self.differentiates(name) else None
            for name, x in zip(self.names, tensors, strict=True)
        ]

    def _all_options(self, tensors: Sequence[Any]) -> dict[str, Any]:
        return self.options | dict(zip(self.names[len(ARRAYS) :], tensors, strict=True))


def _run(
    function: str,
    arrays: tuple[Any, ...],
    how: dict[str, Any],
    options: Mapping[str, object],
    return_lse: bool,
    return_max_logit: bool,
) -> Any:
    """Call as autograd or the compiler needs it."""
    of_options = {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}
    others = {name: x for name, x in options.items() if name not in of_options}
    names, tensors = (*ARRAYS, *of_options), [*arrays, *of_options.values()]
    wanted = tuple(name for name in ON_DEMAND if name in of_options and of_options[name].requires_grad)
    if torch.compiler.is_compiling():
        name = _name_of(function, names, tuple(how), wanted, return_max_logit, **how, **others)
        out, lse, *largest = _compiled_attention(tensors, name)
        largest = [x.detach() for x in largest]
    else:
        call = _Call(function, names, how, others, wanted, return_max_logit)
        if not torch.is_grad_enabled() or not any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
            return call.forward(tensors, return_lse=return_lse)
        out, lse, *largest, _ = _Attention.apply(call, *tensors)
    return alone_or_all([out, *([lse] if return_lse else []), *largest])


class _Attention(torch.autograd.Function):
    """Attention whose gradient will be computed."""

    @staticmethod
    def forward(call: _Call, *tensors: Any) -> tuple[Any, ...]:
        with torch.enable_grad():  # so that all ranks refuse a tensor that requires a gradient and gets none
            if call.function == "attention":
                return *call.forward(tensors, return_lse=True), None
            return call.forward(tensors, return_lse=True, return_ctx=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call, *tensors = inputs
        out, lse, *largest, ctx.kept = output
        ctx.mark_non_differentiable(*largest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, *_: Any) -> tuple[Any, ...]:
        # with create_graph=True a gradient of the gradient would be recorded: q, k or v are then refused, for there is none
        *tensors, out, lse = ctx.saved_tensors
        return None, *ctx.call.backward(dout, dlse, tensors, out, lse, ctx.kept)


# The compiler takes operators of tensors, numbers and texts: what else there is of a call has a name.
_calls: dict[str, _Call] = {}


@torch.compiler.assume_constant_result
def _name_of(
    function: str,
    names: tuple[str, ...],
    how: tuple[str, ...],
    wanted: tuple[str, ...],
    return_max_logit: bool,
    **values: Any,
) -> str:
    """The name of a call; runs when the compiler traces the call.

    It says what the call is, for the compiler keeps what it compiled for other processes.
    """
    call = _Call(function, names, {name: values.pop(name) for name in how}, values, wanted, return_max_logit)
    known = next((name for name, other in _calls.items() if other == call), None)
    if known is None:
        texts = {name: value for name, value in (call.how | call.options).items() if name != "comm"}
        known = f"{len(_calls)} {function} {names} {texts} {wanted} {return_max_logit}"
        _calls[known] = call
    return known


@torch.library.custom_op("ulysses_dp::attention", mutates_args=())
def _compiled_attention(tensors: list[torch.Tensor], call: str) -> list[torch.Tensor]:
    """Attention, its lse, and the largest scores if they are wanted."""
    with torch.enable_grad():
        return list(_calls[call].forward(tensors, return_lse=True))


@torch.library.custom_op("ulysses_dp::attention_backward", mutates_args=())
def _compiled_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    tensors: list[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    call: str,
) -> list[torch.Tensor]:
    """The gradients, of the tensors that have one."""
    with torch.no_grad():
        return [x for x in _calls[call].backward(dout, dlse, tensors, out, lse) if x is not None]


@_compiled_attention.register_fake
def _(tensors: Sequence[Any], call: str) -> list[Any]:
    q, layout = tensors[0], _calls[call].options.get("layout", "bshd")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    of_lse = lse_shape(q.shape, layout)
    more = [q.new_empty(of_lse[-2], dtype=dtype)] if _calls[call].return_max_logit else []
    return [q.new_empty(out_shape(q.shape, tensors[2].shape, layout)), q.new_empty(of_lse, dtype=dtype), *more]


@_compiled_backward.register_fake
def _(dout: Any, dlse: Any, tensors: Sequence[Any], out: Any, lse: Any, call: str) -> list[Any]:
    named = zip(_calls[call].names, tensors, strict=True)
    return [x.new_empty(x.shape) for name, x in named if _calls[call].differentiates(name)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Any]) -> None:
    tensors, ctx.call = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[:2])


def _differentiate(ctx: Any, cotangents: list[Any]) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    dout, dlse, *_ = cotangents
    gradients = iter(_compiled_backward(dout, dlse, tensors, out, lse, ctx.call))
    call = _calls[ctx.call]
    return [next(gradients) if call.differentiates(name) else None for name in call.names], None


_compiled_attention.register_autograd(_differentiate, setup_context=_keep)
for _operator in (_compiled_attention, _compiled_backward):
    if hasattr(_operator, "register_effect"):  # every rank has to run them in the same order, and all of them
        _operator.register_effect(torch.library.EffectType.ORDERED)
