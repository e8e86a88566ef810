"""
Packed sequences
================

Texts have different lengths. Padded to the longest, most of a batch is nothing; packed one behind the other, all of it
counts.

The rows of all sequences lie in one array (layout ``"thd"``), and ``cu_seqlens_q`` says where each begins. A query sees
keys of its own sequence only. Ranks hold equal parts of the packed rows: a sequence may begin on one rank and end on
the next.
"""

import time
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI

from ulysses_dp import attention, ulysses_attention

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # the same on every rank

# %%
# 48 sequences, most of them short.
lengths = np.minimum(rng.lognormal(4.6, 0.9, 48).astype(int) + 8, 1024)
starts = np.concatenate([[0], np.cumsum(lengths)])
total, heads, width = int(starts[-1]), 8, 32
q, k, v = rng.standard_normal((3, total, heads, width), dtype=np.float32)

# %%
# Packed: every rank passes its rows.
mine = slice(comm.rank * total // comm.size, (comm.rank + 1) * total // comm.size)
rows = [np.ascontiguousarray(x[mine]) for x in (q, k, v)]
options = {"layout": "thd", "cu_seqlens_q": starts, "causal": True}
out = ulysses_attention(*rows, **options)

# %%
# Each sequence by itself gives the same.
alone = [attention(*(x[None, a:b] for x in (q, k, v)), causal=True)[0] for a, b in pairwise(starts)]
error = comm.allreduce(np.abs(out - np.concatenate(alone)[mine]).max(), op=MPI.MAX)

# %%
# Padded: the same through a batch of the longest length, of which every rank has a part of the columns.
longest = int(lengths.max())
padded = np.zeros((3, len(lengths), longest, heads, width), dtype=np.float32)
valid = np.arange(longest) < lengths[:, None]
padded[:, valid] = np.stack([q, k, v])
columns = slice(comm.rank * longest // comm.size, (comm.rank + 1) * longest // comm.size)
batch = [np.ascontiguousarray(x[:, columns]) for x in padded]


def seconds(call):
    """The faster of two calls; the first compiles and allocates."""
    taken = []
    for _ in range(3):
        comm.Barrier()
        start = time.perf_counter()
        call()
        comm.Barrier()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


packed_seconds = seconds(lambda: ulysses_attention(*rows, **options))
padded_seconds = seconds(lambda: ulysses_attention(*batch, causal=True, key_padding_mask=valid))

if comm.rank == 0:
    print(f"{len(lengths)} sequences of {lengths.min()} to {longest} rows: {total} packed, {valid.size} padded")
    print(f"largest difference from one call for each sequence: {error:.1e}")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    left.imshow(valid, aspect="auto", interpolation="nearest", cmap="Blues")
    left.set(title="padded: white is waste", xlabel="row", ylabel="sequence")
    owner = np.repeat(np.arange(len(lengths)), lengths)
    sample = owner[:: max(1, total // 600)]
    middle.imshow((sample[:, None] == sample) & np.tri(len(sample), dtype=bool), cmap="Blues", extent=(0, total, total, 0))
    for rank in range(1, comm.size):
        middle.axhline(rank * total / comm.size, color="C1", linewidth=1)
    middle.set(title="packed: what a query sees", xlabel="key", ylabel="query; orange: the next rank")
    right.bar(["packed", "padded"], [1e3 * packed_seconds, 1e3 * padded_seconds], color=["C0", "0.7"])
    right.set(title="time of a call", ylabel="ms")
    figure.savefig("packed_sequences.png", dpi=100)
