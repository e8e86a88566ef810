"""Attention as a function of JAX, which differentiates and compiles it.

A module of its own, which ``import ulysses_dp`` does not import: JAX is an optional requirement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import io_callback

from ._call.definitions import parted, takes
from ._call.layout import lse_shape, out_shape
from ._local import LocalOptions, alone_or_all
from ._mesh import MeshOptions, UlyssesOptions
from .attention import attention as _attention
from .attention import ulysses_attention as _ulysses_attention
from .backward import ARRAYS, DIFFERENTIABLE, ON_DEMAND, TOKENS, attention_backward, ulysses_attention_backward

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Unpack

    from ._ranks.orders import Place


__all__ = ["attention", "ulysses_attention"]


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
    """`ulysses_dp.attention` of JAX arrays, with a gradient for q, k, v, `sinks`, `alibi_slopes` and `bias`.

    Not collective. It may be under ``jax.jit``, ``jax.grad``, ``jax.vmap``, ``jax.checkpoint`` and the like.

    Parameters
    ----------
    q, k, v : jax.Array
        As `ulysses_dp.attention` takes them.
    {names}
        As in `ulysses_dp.attention`. Arrays may be traced; of these, `sinks`, `alibi_slopes` and `bias` may be
        differentiated by.
    return_lse : bool
        Also return the logarithm of the softmax denominators, by which there is a gradient, too.
    return_max_logit : bool
        Also return the largest score of every head, by which there is no gradient.

    Returns
    -------
    out : jax.Array
        What `ulysses_dp.attention` returns.
    lse : jax.Array
        Only with `return_lse`.
    max_logit : jax.Array
        Only with `return_max_logit`, as the last result.

    Raises
    ------
    NotImplementedError
        A gradient by other options is wanted.
    jax.errors.JaxRuntimeError
        When it runs, with the text of what `ulysses_dp.attention` raises.

    Examples
    --------
    >>> import jax
    >>> from ulysses_dp.jax import attention
    >>> q = jax.numpy.ones((1, 16, 4, 8))
    >>> gradient = jax.jit(jax.grad(lambda q: attention(q, q, q, causal=True).sum()))
    >>> gradient(q).shape
    (1, 16, 4, 8)
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
    """`ulysses_dp.ulysses_attention` of JAX arrays, with a gradient for q, k, v, `sinks`, `alibi_slopes` and `bias`.

    Collective over `comm` when it runs, and so is its gradient: every rank is a process of its own, with JAX on one device, and
    runs the same program. The gradient is that of the sum of the losses of all ranks. It may be under ``jax.jit``,
    ``jax.grad``, ``jax.lax.scan`` and the like.

    Parameters
    ----------
    q, k, v : jax.Array
        The rows of this rank, as `ulysses_dp.ulysses_attention` takes them.
    {names}
        As in `ulysses_dp.ulysses_attention`. Arrays may be traced; of these, `sinks`, `alibi_slopes` and `bias` may be
        differentiated by, which gives the gradient of all ranks, the same on each.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default.
    return_lse : bool
        Also return the logarithm of the softmax denominators, by which there is a gradient, too.
    return_max_logit : bool
        Also return the largest score of every head, by which there is no gradient.
    replicated : tuple of q_r, k_r and v_r, optional
        Tokens that every rank has whole, as `ulysses_dp.ulysses_attention` takes them. They may be differentiated by, which
        gives the gradient of all ranks, the same on each. The loss has what comes of them once: every rank computes the same of
        out_r and lse_r.
    replicated_at : {"start", "end"}
        Whether these tokens come before the rows of the ranks or after them.
    {more names}
        As in `ulysses_dp.ulysses_attention`.

    Returns
    -------
    out : jax.Array
        What `ulysses_dp.ulysses_attention` returns.
    lse : jax.Array
        Only with `return_lse`.
    out_r, lse_r : jax.Array
        Only with `replicated`: out and lse of its tokens.
    max_logit : jax.Array
        Only with `return_max_logit`, as the last result.

    Raises
    ------
    NotImplementedError
        A gradient by other options is wanted.
    jax.errors.JaxRuntimeError
        On all ranks, when it runs, with the text of what `ulysses_dp.ulysses_attention` raises.

    Notes
    -----
    It is an ordered ``jax.experimental.io_callback``: JAX runs the calls of a program in its order, each once. So it cannot be
    under ``jax.vmap`` or ``jax.checkpoint``, which raise. q, k and v are sent again for the gradient.

    Examples
    --------
    >>> import jax
    >>> from ulysses_dp.jax import ulysses_attention
    >>> q = jax.numpy.ones((1, 16, 4, 8))  # 16 rows on every rank
    >>> gradient = jax.jit(jax.grad(lambda q: ulysses_attention(q, q, q, causal=True).sum()))
    >>> gradient(q).shape
    (1, 16, 4, 8)
    """
    ways, of_attention = parted(options, MeshOptions)
    how = {"comm": comm} | ways
    if replicated is not None:
        how["replicated_at"] = replicated_at
        if type(replicated) in (tuple, list) and len(replicated) == len(TOKENS) and all(map(_is_array, replicated)):
            of_attention |= zip(TOKENS, map(jnp.asarray, replicated), strict=True)
        else:  # to be refused
            how["replicated"] = replicated
    return _run("ulysses_attention", (q, k, v), how, of_attention, return_lse, return_max_logit)


_FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (_attention, attention_backward),
    "ulysses_attention": (_ulysses_attention, ulysses_attention_backward),
}


@dataclass(frozen=True, eq=False)
class _Call:
    """A call without what of it is an array of JAX."""

    function: str
    how: Mapping[str, Any]  # it is computed
    options: Mapping[str, Any]
    return_max_logit: bool

    def run(self, function: Callable[..., Any], shapes: Any, *arguments: Any) -> Any:
        """Run a method of this on the host, as a part of the program of JAX."""
        if self.function == "ulysses_attention":
            return io_callback(function, shapes, *arguments, ordered=True)
        return jax.pure_callback(function, shapes, *arguments, vmap_method="sequential")

    def forward(self, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
        """The result and its lse, both of replicated tokens, and the largest scores, if there are such."""
        inputs, tokens, options = self._arguments(arrays)
        if tokens:
            options["replicated"] = tokens
        options["return_max_logit"] = self.return_max_logit
        results: tuple[Any, ...] = _FUNCTIONS[self.function][0](*inputs, return_lse=True, **options)
        return results

    def backward(
        self,
        cotangents: Sequence[Any],
        arrays: Mapping[str, Any],
        wanted: Mapping[str, Any],
        results: Sequence[Any],
    ) -> dict[str, Any]:
        """The gradients, by the names of the arrays that have one; without that of an lse, the loss does not depend on it.

        `wanted` has the names of the options whose gradient is computed on demand. Results are out and lse, and those of
        replicated tokens.
        """
        inputs, tokens, options = self._arguments(arrays)
        sinks = {} if options.get("sinks") is None else {"sinks": None}
        options |= {ON_DEMAND[name]: True for name in wanted}
        dout, dlse, *of_tokens = (None if x is None else np.asarray(x) for x in cotangents)
        out, lse, *results_of_tokens = map(np.asarray, results)
        if tokens:
            dout_r, *dlse_r = (x for x in of_tokens if x is not None)
            options["replicated"] = (dout_r, *tokens, *results_of_tokens, *dlse_r)
        gradients = _FUNCTIONS[self.function][1](dout, *inputs, out, lse, dlse=dlse, **options)
        names = (*ARRAYS, *(TOKENS if tokens else ()), *sinks, *(name for name in ON_DEMAND if name in wanted))
        by_name = dict(zip(names, gradients, strict=True))
        return {name: by_name[name].astype(x.dtype, copy=False) for name, x in arrays.items() if name in by_name}

    def _arguments(self, arrays: Mapping[str, Any]) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
        """q, k and v; those of replicated tokens, if there are any; and all options."""
        host = {name: np.asarray(x) for name, x in arrays.items()}
        inputs, tokens = [host.pop(name) for name in ARRAYS], tuple(host.pop(name) for name in TOKENS if name in host)
        return inputs, tokens, {**self.how, **self.options, **host}


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _run(
    function: str,
    inputs: Sequence[Any],
    how: Mapping[str, Any],
    options: Mapping[str, Any],
    return_lse: bool,
    return_max_logit: bool,
) -> Any:
    """Call with what JAX may trace apart from the rest."""
    if not all(map(_is_array, inputs)) or "replicated" in how:  # JAX would raise, but on this rank alone
        inputs = [np.empty(x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in inputs]
        tokens = {"replicated": tuple(options[name] for name in TOKENS)} if TOKENS[0] in options else {}
        others = {name: x for name, x in options.items() if name not in TOKENS}
        return _FUNCTIONS[function][0](*inputs, return_lse=return_lse, **how, **tokens, **others)
    traced = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    others = {name: x for name, x in options.items() if name not in traced}
    call = _Call(function, how, others, return_max_logit)
    results = _attend(call, dict(zip(ARRAYS, map(jnp.asarray, inputs), strict=True)) | traced)
    pairs, largest = (results[:-1], results[-1:]) if return_max_logit else (results, ())
    return alone_or_all([*(pairs if return_lse else pairs[::2]), *map(jax.lax.stop_gradient, largest)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, arrays: dict[str, Any]) -> tuple[Any, ...]:
    layout, shape_of = call.options.get("layout", "bshd"), jax.ShapeDtypeStruct
    of_input = arrays["q"].dtype
    of_lse = np.float64 if of_input == np.float64 else np.float32
    shapes = []
    for q, v in (("q", "v"), ("q_r", "v_r")) if TOKENS[0] in arrays else (("q", "v"),):
        of_q, of_v = arrays[q].shape, arrays[v].shape
        shapes += [shape_of(out_shape(of_q, of_v, layout), of_input), shape_of(lse_shape(of_q, layout), of_lse)]
    if call.return_max_logit:
        shapes.append(shape_of(shapes[1].shape[-2:-1], of_lse))
    results: tuple[Any, ...] = call.run(call.forward, tuple(shapes), arrays)
    return results


def _keep(call: _Call, arrays: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The results, and what the gradient needs."""
    for name, x in arrays.items():
        if x.perturbed and name not in DIFFERENTIABLE:
            raise NotImplementedError(f"there is no gradient of {name}; use jax.lax.stop_gradient({name})")
    values = {name: x.value for name, x in arrays.items()}
    wanted = dict.fromkeys(name for name in ON_DEMAND if name in arrays and arrays[name].perturbed)
    results = _attend(call, values)
    return results, (values, wanted, results[:-1] if call.return_max_logit else results)


def _differentiate(call: _Call, kept: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[dict[str, Any]]:
    """The gradients of the arrays, and nothing for those that have none."""
    arrays, wanted, results = kept
    given: list[Any] = []
    for n, x in enumerate(cotangents[: len(results)]):
        absent = isinstance(x, SymbolicZero)
        given.append(x if not absent else None if n % 2 else jnp.zeros(x.shape, x.dtype))
    names = {name for name in DIFFERENTIABLE if name not in ON_DEMAND or name in wanted}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items() if name in names}
    return (dict.fromkeys(arrays) | call.run(call.backward, shapes, given, *kept),)


_attend.defvjp(_keep, _differentiate, symbolic_zeros=True)
