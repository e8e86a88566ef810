"""
A sliding window on a very long series
======================================

A window makes attention linear in the length: a quarter of a million samples are smoothed without blurring their jumps.

The series is a telegraph signal, which jumps between levels, under noise. A sample becomes the mean of the samples near
it, weighted by how alike they are: a bilateral filter, and the same trick as for photographs. Each sample sees 200
others to the left and to the right, also those that another rank holds. Keys outside the window take no time.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI

from ulysses_dp import ulysses_attention

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # the same series on every rank

# %%
# 262144 samples with a jump every 500 or so.
n, noise, reach = 2**18, 0.5, 200
levels = rng.integers(-3, 4, n // 400)
clean = np.repeat(levels, 50 + rng.exponential(450, len(levels)).astype(int))[:n].astype(float)
noisy = clean + noise * rng.standard_normal(n)
smooth = np.convolve(noisy, np.ones(25) / 25, mode="same")  # to compare samples by; blurs the jumps


# %%
# Two widths of the weight are two heads. q and k are made so that their product is ``-(a - b)² / 2 h²``, up to what the softmax
# cancels.
def filtered(samples, guide, window):
    """Filter this rank's part of a series; samples and guide are its rows."""
    h = np.array([0.3, 0.5])
    a = guide[:, None] / h
    q = np.stack([a, np.ones_like(a), 0 * a, 0 * a], axis=-1)[None]
    k = np.stack([a, -(a**2) / 2, 0 * a, 0 * a], axis=-1)[None]
    v = np.stack([np.repeat(samples[:, None], 2, axis=1), 0 * a, 0 * a, 0 * a], axis=-1)[None]
    q, k, v = (np.ascontiguousarray(x, dtype=np.float32) for x in (q, k, v))
    return ulysses_attention(q, k, v, softmax_scale=1.0, window_size=window)[0, :, :, 0].mean(axis=1)


mine = slice(comm.rank * n // comm.size, (comm.rank + 1) * n // comm.size)
result = filtered(noisy[mine], smooth[mine], (reach, reach))
parts = comm.gather(result)

# %%
# How the time grows with the length, with and without a window.
lengths, seconds = [2**e for e in range(12, 16)], {"window": [], "whole": []}
for length in lengths:
    part = slice(comm.rank * length // comm.size, (comm.rank + 1) * length // comm.size)
    for name, window in (("window", (reach, reach)), ("whole", (-1, -1))):
        filtered(noisy[part], smooth[part], window)  # the first call of a kind compiles and allocates
        comm.Barrier()
        start = time.perf_counter()
        filtered(noisy[part], smooth[part], window)
        comm.Barrier()
        seconds[name].append(time.perf_counter() - start)

if comm.rank == 0:
    denoised = np.concatenate(parts)
    for name, series in (("noisy", noisy), ("moving average", smooth), ("attention", denoised)):
        print(f"{name:15} root mean square error {np.sqrt(np.mean((series - clean) ** 2)):.3f}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=(2, 1))
    show = slice(n // 2 - 1500, n // 2 + 1500)  # the border between two ranks is in the middle
    left.plot(noisy[show], color="0.8", label="noisy")
    left.plot(smooth[show], color="C1", label="moving average")
    left.plot(denoised[show], color="C0", label="attention")
    left.set(xlabel="sample", title=f"3000 of {n} samples")
    left.legend(loc="upper right")
    for name, label in (("whole", "every sample sees all"), ("window", f"{reach} to each side")):
        right.loglog(lengths, seconds[name], "o-", label=label)
    right.set(xlabel="samples", ylabel="seconds", title="time of a call")
    right.legend()
    figure.savefig("sliding_window.png", dpi=100)
