"""
Plan a run on Aurora
====================

How many tiles does a sequence of a million rows want, and when does a longer one no longer fit? ``plan`` tells without
a run.

Messages, bytes and memory are exact. Time is a model of the machine, made of published figures: no kernel of this
package has run on Aurora. Where the figures come from is in the guide on planning. This script makes no call, so one
rank does it all.
"""

import matplotlib.pyplot as plt
from mpi4py import MPI

from ulysses_dp import plan

# %%
# One layer of a model with 32 heads and 8 kv heads, forward and backward, on 1 to 1024 tiles of 64 GiB.
problem = {"heads": 32, "kv_heads": 8, "head_dim": 128, "causal": True, "backward": True, "machine": "aurora"}
ranks = [2**n for n in range(11)]
plans = [plan(2**20, ranks=n, **problem) for n in ranks]

if MPI.COMM_WORLD.rank == 0:
    for p in plans:
        memory = sum(p.memory.values()) / 2**30
        fits = "" if p.fits else "  does not fit"
        print(f"{p.ranks:5} tiles: {p.seconds:8.2f} s, {memory:6.1f} GiB each, {p.efficiency:4.0%} efficient{fits}")
    print(*plans[-1].notes, sep="\n")

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    names = ("attention", "attention backward", "scatter", "gather")
    for name in names:
        stages = [[s.seconds for s in (*p.forward.stages, *p.backward.stages) if s.name == name] for p in plans]
        left.loglog(ranks, [sum(s) or None for s in stages], ".-", label=name)
    left.loglog(ranks, [p.seconds for p in plans], "ko-", label="whole")
    left.axvline(problem["heads"], color="0.6", linestyle="--", label="as many tiles as heads")
    left.set(xlabel="tiles", ylabel="seconds", title="a million rows, by the model")
    left.legend(fontsize=8)
    right.loglog(ranks, [p.largest_seq for p in plans], "o-")
    right.axhline(2**20, color="0.6", linestyle="--")
    right.set(xlabel="tiles", ylabel="rows", title="longest sequence that fits")
    figure.savefig("planning.png", dpi=100)

# %%
# More tiles than heads do not make a call faster, but a longer sequence fits.
