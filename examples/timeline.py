"""
Where the time of a call goes
=============================

``trace`` records each stage of a call on each rank. This draws the record as a timeline, and saves it for Perfetto.

Two calls are recorded, a forward pass and its gradient, after one that compiles the kernels and gets the memory. Open
``trace.json`` at https://ui.perfetto.dev to look around in it, with the bytes and messages of each stage.
"""

import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI

from ulysses_dp import trace, ulysses_attention, ulysses_attention_backward

comm = MPI.COMM_WORLD
q, k, v, dout = np.random.default_rng(comm.rank).standard_normal((4, 1, 1024, 8, 64), dtype=np.float32)


# %%
# A forward pass and its gradient; ``ctx`` saves sending q, k and v a second time.
def step():
    """Forward and backward."""
    out, lse, ctx = ulysses_attention(q, k, v, causal=True, return_lse=True, return_ctx=True)
    ulysses_attention_backward(dout, q, k, v, out, lse, ctx=ctx, causal=True)


step()
comm.Barrier()
with trace() as record:
    step()
record.save("trace.json", comm)

# %%
# The clocks of the ranks differ: each counts from the start of its own first call, just behind a barrier.
start = record.calls[0].start
stages = [(s.name, 1e3 * (s.start - start), 1e3 * s.seconds, s.bytes_sent) for s in record.stages]
everyone = comm.gather(stages)

if comm.rank == 0:
    names = list(dict.fromkeys(name for rank in everyone for name, *_ in rank))
    colours = dict(zip(names, plt.colormaps["tab20"].colors, strict=False))
    figure, axes = plt.subplots(figsize=(12, 1.2 + comm.size), layout="constrained")
    for rank, of_rank in enumerate(everyone):
        for name, begin, duration, _ in of_rank:
            axes.broken_barh([(begin, duration)], (rank - 0.4, 0.8), color=colours[name])
    for name in names:
        axes.broken_barh([(0, 0)], (0, 0), color=colours[name], label=name)
    axes.set(xlabel="milliseconds", yticks=range(comm.size), yticklabels=[f"rank {r}" for r in range(comm.size)])
    axes.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
    figure.savefig("timeline.png", dpi=100)
    for call in record.calls:
        sent = sum(stage.bytes_sent for stage in call.stages)
        print(f"{call.function}: {1e3 * call.seconds:.1f} ms, {sent / 1e6:.1f} MB sent by rank 0")
