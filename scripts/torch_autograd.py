"""Sequence-parallel attention in PyTorch's autograd: mpiexec -n 2 python scripts/torch_autograd.py"""

from __future__ import annotations

import torch
from mpi4py import MPI

from ulysses_dp.torch import ulysses_attention


def main() -> None:
    """Compare with autograd through PyTorch's own attention of the rows of all ranks."""
    comm = MPI.COMM_WORLD
    torch.manual_seed(0)  # the same numbers on every rank, of which each takes its rows
    whole = [torch.randn(2, 32 * comm.size, heads, 16) for heads in (8, 2, 2, 8)]
    mine = slice(32 * comm.rank, 32 * comm.rank + 32)
    q, k, v = (x[:, mine].clone().requires_grad_() for x in whole[:3])
    loss = (ulysses_attention(q, k, v, comm=comm, causal=True) * whole[3][:, mine]).sum()
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
