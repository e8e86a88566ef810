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
from .backward import ARRAYS, DIFFERENTIABLE, ON_DEMAND, TOKENS, attention_backward, ulysses_attention_backward

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from typing_extensions import Unpack

    from ._ranks.orders import Place


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
    replicated: tuple[Any, Any, Any] | None = None,
    replicated_at: Place = "start",
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
    replicated : tuple of q_r, k_r and v_r, optional
        Tokens that every rank has whole, as `ulysses_dp.ulysses_attention` takes them. They may require a gradient, on all
        ranks alike, which is that of all ranks, the same on each. The loss has what comes of them once: every rank computes the
        same of out_r and lse_r.
    replicated_at : {"start", "end"}
        Whether these tokens come before the rows of the ranks or after them.
    {more names}
        As in `ulysses_dp.ulysses_attention`.

    Returns
    -------
    out : torch.Tensor
        What `ulysses_dp.ulysses_attention` returns, as a part of the graph of autograd.
    lse : torch.Tensor
        Only with `return_lse`.
    out_r, lse_r : torch.Tensor
        Only with `replicated`: out and lse of its tokens.
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
    how = {"comm": comm} | {name: x for name, x in options.items() if name in _WAYS}
    of_attention: dict[str, Any] = {name: x for name, x in options.items() if name not in _WAYS}
    if replicated is not None:
        how["replicated_at"] = replicated_at
        if type(replicated) in (tuple, list) and len(replicated) == len(TOKENS):
            of_attention |= zip(TOKENS, replicated, strict=True)
        else:  # to be refused
            how["replicated"] = replicated
    return _run("ulysses_attention", (q, k, v), how, of_attention, return_lse, return_max_logit)


@dataclass(frozen=True)
class _Call:
    """A call without its tensors."""

    function: str
    names: tuple[str, ...]  # of the tensors: q, k, v, replicated ones and options
    how: dict[str, Any]  # it is computed
    options: dict[str, Any]  # that are no tensors
    wanted: tuple[str, ...]  # of the options whose gradient is computed on demand, those that have one
    return_max_logit: bool

    def differentiates(self, name: str) -> bool:
        """Whether a tensor of this name gets a gradient."""
        return name in DIFFERENTIABLE and (name not in ON_DEMAND or name in self.wanted)

    @property
    def has_tokens(self) -> bool:
        """Whether there are replicated ones."""
        return TOKENS[0] in self.names or TOKENS[0] in self.options

    def forward(self, tensors: Sequence[Any], **wishes: Any) -> tuple[Any, ...]:
        """The results for these tensors, of which those that get a gradient have none that is recorded in here."""
        given = self._arguments(
            x.detach() if name in DIFFERENTIABLE and isinstance(x, torch.Tensor) else x
            for name, x in zip(self.names, tensors, strict=True)
        )
        tokens: dict[str, Any] = {"replicated": tuple(map(given.pop, TOKENS))} if self.has_tokens else {}
        arrays = [*map(given.pop, ARRAYS)]
        function = _ulysses_attention if self.function == "ulysses_attention" else _attention
        wishes["return_max_logit"] = self.return_max_logit
        return function(*arrays, **wishes, **self.how, **tokens, **given)

    def backward(
        self, cotangents: Sequence[Any], tensors: Sequence[Any], results: Sequence[Any], kept: Any = None
    ) -> list[Any]:
        """The gradients, in the order of the tensors.

        Without the cotangent of a result, the loss does not depend on it. Results are out and lse, and those of replicated
        tokens.
        """
        given = self._arguments(tensors)
        arrays = [*map(given.pop, ARRAYS)]
        sinks = {} if given.get("sinks") is None else {"sinks": None}
        more: dict[str, Any] = {ON_DEMAND[name]: True for name in self.wanted}
        dout, dlse, *of_tokens = (
            torch.zeros_like(y) if x is None and not n % 2 else x
            for n, (x, y) in enumerate(zip(cotangents, results, strict=False))
        )
        if self.has_tokens:
            dout_r, *dlse_r = (x for x in of_tokens if x is not None)
            more["replicated"] = (dout_r, *map(given.pop, TOKENS), *results[2:], *dlse_r)
        if self.function == "ulysses_attention":
            more |= self.how | ({"ctx": kept} if kept else given)
            gradients = ulysses_attention_backward(dout, *arrays, *results[:2], dlse=dlse, **more)
        else:
            gradients = attention_backward(dout, *arrays, *results[:2], dlse=dlse, **more, **given)
        names = (*ARRAYS, *(TOKENS if self.has_tokens else ()), *sinks, *self.wanted)
        by_name = dict(zip(names, gradients, strict=True))
        return [
            by_name[name].to(x.dtype) if self.differentiates(name) else None
            for name, x in zip(self.names, tensors, strict=True)
        ]

    def _arguments(self, tensors: Iterable[Any]) -> dict[str, Any]:
        """Tensors and options by name."""
        return self.options | dict(zip(self.names, tensors, strict=True))


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
        results = _compiled_attention(tensors, name)
        results = [*results[:-1], results[-1].detach()] if return_max_logit else results
    else:
        call = _Call(function, names, how, others, wanted, return_max_logit)
        if not torch.is_grad_enabled() or not any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
            return call.forward(tensors, return_lse=return_lse)
        *results, _ = _Attention.apply(call, *tensors)
    pairs, largest = (results[:-1], results[-1:]) if return_max_logit else (results, [])
    return alone_or_all([*(pairs if return_lse else pairs[::2]), *largest])


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
        *results, ctx.kept = output
        if ctx.call.return_max_logit:
            ctx.mark_non_differentiable(results.pop())
        ctx.set_materialize_grads(False)
        ctx.results = len(results)
        ctx.save_for_backward(*results, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        # with create_graph=True a gradient of the gradient would be recorded: q, k or v are then refused, for there is none
        saved = ctx.saved_tensors  # which may be asked for only once
        results, tensors = saved[: ctx.results], saved[ctx.results :]
        return None, *ctx.call.backward(cotangents, tensors, results, ctx.kept)


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
    """Attention, its lse, both of replicated tokens, and the largest scores, if there are such."""
    with torch.enable_grad():
        return list(_calls[call].forward(tensors, return_lse=True))


@torch.library.custom_op("ulysses_dp::attention_backward", mutates_args=())
def _compiled_backward(
    cotangents: list[torch.Tensor | None], tensors: list[torch.Tensor], results: list[torch.Tensor], call: str
) -> list[torch.Tensor]:
    """The gradients, of the tensors that have one."""
    with torch.no_grad():
        return [x for x in _calls[call].backward(cotangents, tensors, results) if x is not None]


@_compiled_attention.register_fake
def _(tensors: Sequence[Any], call: str) -> list[Any]:
    given, layout = dict(zip(_calls[call].names, tensors, strict=True)), _calls[call].options.get("layout", "bshd")
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    results = []
    for q, v in (("q", "v"), ("q_r", "v_r")) if _calls[call].has_tokens else (("q", "v"),):
        of_q, of_v = given[q].shape, given[v].shape
        results += [given[q].new_empty(out_shape(of_q, of_v, layout)), given[q].new_empty(lse_shape(of_q, layout), dtype=dtype)]
    return results + ([results[1].new_empty(results[1].shape[-2])] if _calls[call].return_max_logit else [])


@_compiled_backward.register_fake
def _(cotangents: Any, tensors: Sequence[Any], results: Any, call: str) -> list[Any]:
    named = zip(_calls[call].names, tensors, strict=True)
    return [x.new_empty(x.shape) for name, x in named if _calls[call].differentiates(name)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Any]) -> None:
    tensors, ctx.call = inputs
    ctx.set_materialize_grads(False)
    results = output[:-1] if _calls[ctx.call].return_max_logit else output
    ctx.results = len(results)
    ctx.save_for_backward(*results, *tensors)


def _differentiate(ctx: Any, cotangents: list[Any]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    results, tensors = saved[: ctx.results], saved[ctx.results :]
    gradients = iter(_compiled_backward(cotangents[: ctx.results], tensors, results, ctx.call))
    call = _calls[ctx.call]
    return [next(gradients) if call.differentiates(name) else None for name in call.names], None


_compiled_attention.register_autograd(_differentiate, setup_context=_keep)
for _operator in (_compiled_attention, _compiled_backward):
    if hasattr(_operator, "register_effect"):  # every rank has to run them in the same order, and all of them
        _operator.register_effect(torch.library.EffectType.ORDERED)
