"""Sequence-parallel attention in PyTorch's autograd: mpiexec -n 2 python scripts/torch_autograd.py"""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from ulysses_dp import ulysses_attention, ulysses_attention_backward


class UlyssesFunction(torch.autograd.Function):
    """`ulysses_attention` with a gradient for q, k, v and sinks.

    Both passes are collective: every rank has to call forward, and to come by here in backward, as often as the others. So all
    gradients are computed, even where a rank does not need them all.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sinks: Any, options: dict[str, Any]) -> Any:
        # no gradient is recorded in here, so tensors that require one are taken
        wish = {"return_lse": True, "return_ctx": True}
        out, lse, ctx.exchanged = ulysses_attention(q, k, v, sinks=sinks, **wish, **options)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> tuple[Any, ...]:
        # with create_graph=True a gradient of the gradient would be recorded: q, k or v are then refused, for there is none
        q, k, v, out, lse, sinks = ctx.saved_tensors
        options = {"sinks": sinks, "ctx": ctx.exchanged, **ctx.options}
        dq, dk, dv, *dsinks = ulysses_attention_backward(dout, q, k, v, out, lse, **options)
        return dq, dk, dv, dsinks[0].to(sinks.dtype) if dsinks else None, None


def ulysses(q: Any, k: Any, v: Any, comm: Any = None, *, sinks: Any = None, **options: Any) -> Any:
    """Attention over the rows of all ranks that autograd can differentiate; takes the options of `ulysses_attention`.

    The gradient is that of the sum of the losses of all ranks. That of sinks already is the sum over the ranks, and must not
    be added up again.
    """
    for name, x in options.items():
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"there is no gradient of {name}; use {name}.detach()")
    return UlyssesFunction.apply(q, k, v, sinks, {"comm": comm, **options})


def main() -> None:
    """Compare with autograd through PyTorch's own attention of the rows of all ranks."""
    comm = MPI.COMM_WORLD
    torch.manual_seed(0)  # the same numbers on every rank, of which each takes its rows
    whole = [torch.randn(2, 32 * comm.size, heads, 16) for heads in (8, 2, 2, 8)]
    mine = slice(32 * comm.rank, 32 * comm.rank + 32)
    q, k, v = (x[:, mine].clone().requires_grad_() for x in whole[:3])
    loss = (ulysses(q, k, v, comm, causal=True) * whole[3][:, mine]).sum()
    loss.backward()

    theirs = [x.clone().requires_grad_() for x in whole[:3]]
    heads_first = (x.transpose(1, 2) for x in theirs)
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    (out * whole[3]).sum().backward()
    for name, x, expected in zip(("dq", "dk", "dv"), (q, k, v), theirs, strict=True):
        difference = (x.grad - expected.grad[:, mine]).abs().max().item()
        print(f"rank {comm.rank}: {name} {tuple(x.grad.shape)} differs from PyTorch's by at most {difference:.1e}", flush=True)
        if not difference < 1e-4:
            print(f"FAILED: {name} is wrong", flush=True)
            comm.Abort(1)


if __name__ == "__main__":
    main()
