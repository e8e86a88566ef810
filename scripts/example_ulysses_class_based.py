"""The class of yunchang's users: mpiexec -n 2 python scripts/example_ulysses_class_based.py"""

import numpy as np
from mpi4py import MPI

from ulysses_dp import AttnType, UlyssesAttention

comm = MPI.COMM_WORLD
layer = UlyssesAttention(sequence_process_group=comm, scatter_idx=2, gather_idx=1, attn_type=AttnType.INTEL_SYCL)

# 512 rows on every rank, as NumPy arrays: the result is one too
query, key, value = np.random.default_rng(comm.rank).standard_normal((3, 1, 512, 8, 64), dtype=np.float32)
out = layer(query, key, value, causal=True)
print(f"rank {comm.rank}: {type(out).__name__} {out.shape}")
