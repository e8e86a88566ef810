"""
Which rows a rank holds
=======================

With a causal mask, late rows see most keys. This draws the orders of rows, and counts the work that each gives to a rank.

The ranks are a pure ring here, as they are where there is one head for all. ``row_positions`` says which rows a rank holds in
each order, and ``trace`` counts the pairs of a query and a key that it computes.
"""

import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI

from ulysses_dp import row_positions, shard_rows, trace, ulysses_attention

comm = MPI.COMM_WORLD
orders = "contiguous", "zigzag", "zigzag_ranks", "striped"
seq = 16 * comm.size
x = np.random.default_rng(0).standard_normal((1, seq, 1, 16), dtype=np.float32)  # the whole, on every rank

# %%
# The rank of every row, and the pairs of every rank, by order.
owners, pairs = {}, {}
for order in orders:
    owners[order] = np.empty(seq, int)
    for rank, rows in enumerate(comm.allgather(row_positions(seq, order=order, ring=comm.size))):
        owners[order][rows] = rank
    mine = shard_rows(x, order=order, ring=comm.size)
    with trace() as record:
        ulysses_attention(mine, mine, mine, causal=True, ring=comm.size, order=order)
    pairs[order] = comm.allgather(sum(call.pairs for call in record.calls))

# %%
# The busiest rank, as a multiple of the mean: the others wait for it.
if comm.rank == 0:
    figure, axes = plt.subplots(figsize=(10, 3), layout="constrained")
    axes.pcolormesh(np.stack([owners[order] for order in reversed(orders)]), cmap="tab10", vmin=0, vmax=9, edgecolors="white")
    axes.set(xlabel="row", yticks=np.arange(len(orders)) + 0.5, yticklabels=reversed(orders))
    for rank in range(comm.size):
        axes.scatter([], [], marker="s", color=plt.colormaps["tab10"](rank % 10), label=f"rank {rank}")
    axes.legend(ncols=comm.size, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig("orders_of_rows.png", dpi=100)
    for order, of_ranks in pairs.items():
        print(f"{order:12} {max(of_ranks) / np.mean(of_ranks):.3f} times the mean: {of_ranks}")
