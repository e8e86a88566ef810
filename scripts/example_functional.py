"""The functional interface: mpiexec -n 2 python scripts/example_functional.py"""

import dpnp
from mpi4py import MPI

from ulysses_dp import ulysses_attention

rank = MPI.COMM_WORLD.rank
dpnp.random.seed(rank)

# 512 rows on every rank; 8 query heads share 2 key and value heads
q = dpnp.random.standard_normal((1, 512, 8, 64)).astype("float32")
k = dpnp.random.standard_normal((1, 512, 2, 64)).astype("float32")
v = dpnp.random.standard_normal((1, 512, 2, 64)).astype("float32")

out, lse = ulysses_attention(q, k, v, causal=True, return_lse=True)
print(f"rank {rank}: out {out.shape}, lse {lse.shape}, on {out.sycl_device.name}")
