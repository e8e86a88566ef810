"""
Train an attention regression
=============================

A regression that learns which of its inputs matter, trained over ranks by the gradient of attention and Adam in plain
NumPy.

The points have 8 coordinates, of which only the first two tell the height y. A new point's height is guessed as the
mean of the known heights, weighted by how near the points are: a kernel regression, which is attention with the known
points as keys and their heights as values. Near in what sense? ``q = x W``, ``k = x W``: the metric W is what training
finds, here for 4 heads.
"""

import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI

from ulysses_dp import ulysses_attention, ulysses_attention_backward

comm = MPI.COMM_WORLD
n, inputs, heads, width = 1536, 8, 4, 8


# %%
# Each rank draws its own known points, and its own points to guess in training and to test with.
def draw(rng, rows):
    """Points, and their heights."""
    x = rng.uniform(-1, 1, (rows, inputs)).astype(np.float32)
    return x, np.sin(3 * x[:, 0]) * np.cos(2 * x[:, 1]) + 0.05 * rng.standard_normal(rows).astype(np.float32)


rng = np.random.default_rng([1, comm.rank])
known_x, known_y = draw(rng, n // comm.size)
test_x, test_y = draw(rng, 512 // comm.size)
w = np.random.default_rng(0).normal(0, 1, (heads, inputs, width)).astype(np.float32)  # the same on every rank


# %%
# q and k carry the squared distance: ``2 a · b - |b|²`` is ``-|a - b|²`` but for what the softmax cancels.
def embed(x, w):
    """(rows, inputs) -> coordinates in the metric of each head, (rows, heads, width)."""
    return np.einsum("ri,hiw->rhw", x, w)


def tokens(a, last):
    """Append one coordinate, and zeros up to 16: (1, rows, heads, 16)."""
    filled = np.zeros((1, *a.shape[:2], 16), dtype=np.float32)
    filled[0, :, :, :width] = a
    filled[0, :, :, width] = last
    return filled


def guess(x, w, **wish):
    """Guessed heights of this rank's points, and what the gradient needs."""
    a, b = embed(x, w), embed(known_x, w)
    q, k = tokens(2 * a, 1), tokens(b, -(b * b).sum(axis=-1))
    v = np.zeros_like(k)
    v[..., 0] = known_y[:, None]
    result = ulysses_attention(q, k, v, softmax_scale=1.0, **wish)
    out = result[0] if wish else result
    return out[0, :, :, 0].mean(axis=1), (q, k, v, result, b)


# %%
# Adam; the gradient by W is the sum over the ranks, because all share W.
moment, square, losses = np.zeros_like(w), np.zeros_like(w), []
for step in range(1, 121):
    x, y = draw(rng, 256 // comm.size)
    guessed, (q, k, v, (out, lse, ctx), b) = guess(x, w, return_lse=True, return_ctx=True)
    difference = guessed - y
    losses.append(comm.allreduce(float((difference**2).sum())) / 256)

    dout = np.zeros_like(out)
    dout[0, :, :, 0] = (2 / 256 / heads) * difference[:, None]
    dq, dk, _ = ulysses_attention_backward(dout, q, k, v, out, lse, ctx=ctx, softmax_scale=1.0)
    da = 2 * dq[0, :, :, :width]
    db = dk[0, :, :, :width] - 2 * b * dk[0, :, :, width:][..., :1]
    dw = np.einsum("ri,rhw->hiw", x, da) + np.einsum("ri,rhw->hiw", known_x, db)
    dw = comm.allreduce(dw)

    moment, square = 0.9 * moment + 0.1 * dw, 0.99 * square + 0.01 * dw**2
    w -= 0.05 * (moment / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)

# %%
# What it has learned: the two inputs that matter.
guessed, _ = guess(test_x, w)
error = np.sqrt(comm.allreduce(float(((guessed - test_y) ** 2).sum())) / (512 // comm.size * comm.size))
points = comm.gather((test_y, guessed))
if comm.rank == 0:
    errors = [x**0.5 for x in (losses[0], losses[-1])]
    print(f"root mean square error: training {errors[0]:.3f} -> {errors[1]:.3f}, new points {error:.3f}")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    left.semilogy(losses)
    left.set(xlabel="step", title="mean square error")
    middle.bar(range(1, inputs + 1), np.linalg.norm(w, axis=(0, 2)))
    middle.set(xlabel="input", title="weight of each input in the metric")
    right.plot(*np.concatenate([np.stack(p) for p in points], axis=1), ".", markersize=3)
    right.set(xlabel="height", ylabel="guessed", title="new points")
    figure.savefig("training.png", dpi=100)
