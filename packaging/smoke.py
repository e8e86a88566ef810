"""Does an installed ulysses_dp compute what it should? It needs the package, and nothing of the sources.

Run ``mpiexec -n 3 python packaging/smoke.py``. Rank 0 prints one line. A wrong result ends all ranks with exit code 1.
"""

import importlib.metadata
import platform
import sys

import dpnp
import numpy as np
from mpi4py import MPI

import ulysses_dp


def dense(q, k, v, dout):
    """Causal attention and its gradient in float64, of arrays (seq, head_dim), straight from the definition."""
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    scale = q.shape[1] ** -0.5
    scores = np.where(np.tri(len(q), dtype=bool), scale * q @ k.T, -np.inf)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    out, dp = p @ v, dout @ v.T
    ds = scale * p * (dp - (p * dp).sum(axis=1, keepdims=True))
    return out, ds.T @ q, p.T @ dout, ds @ k


def main():
    """Compare forward and gradient, for NumPy and dpnp arrays, with rows and heads that no number of ranks divides."""
    comm = MPI.COMM_WORLD
    seq, heads, kv_heads, width = 101, 6, 3, 40
    rng = np.random.default_rng(0)  # the same arrays on every rank
    q, dout = rng.standard_normal((2, 1, seq, heads, width), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, seq, kv_heads, width), dtype=np.float32)
    expected = [np.zeros(x.shape) for x in (q, q, k, v)]  # out, dq, dk, dv
    for h in range(heads):
        n = h * kv_heads // heads
        out, dk, dv, dq = dense(q[0, :, h], k[0, :, n], v[0, :, n], dout[0, :, h])
        for total, head, part in zip(expected, (h, h, n, n), (out, dq, dk, dv), strict=True):
            total[0, :, head] += part
    mine = slice(comm.rank * seq // comm.size, (comm.rank + 1) * seq // comm.size)
    worst = 0.0
    for array, back in ((np.asarray, np.asarray), (dpnp.asarray, dpnp.asnumpy)):
        mine_q, mine_k, mine_v, mine_dout = (array(x[:, mine]) for x in (q, k, v, dout))
        out, lse = ulysses_dp.ulysses_attention(mine_q, mine_k, mine_v, causal=True, return_lse=True)
        gradient = ulysses_dp.ulysses_attention_backward(mine_dout, mine_q, mine_k, mine_v, out, lse, causal=True)
        for x, total in zip((out, *gradient), expected, strict=True):
            worst = max(worst, float(np.abs(back(x) - total[:, mine]).max(initial=0.0)))
    worst = comm.allreduce(worst, op=MPI.MAX)
    if comm.rank == 0:
        names = ("ulysses_dp", "dpctl", "dpnp", "numpy", "mpi4py")
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        verdict = "right" if worst < 1e-4 else "WRONG"
        print(f"{verdict}: error {worst:.1e} on {comm.size} ranks, Python {platform.python_version()}, {versions}, {library}")
    sys.exit(not worst < 1e-4)


if __name__ == "__main__":
    main()
