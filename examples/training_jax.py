"""
Train through JAX
=================

Attention over ranks as a function of JAX, compiled and differentiated with the rest of a model.

The model is a layer that smooths: it has to find the slow wave under noise, at each point of a series that is split over
the ranks. Every rank compiles the same step. The gradients of the weights, which all ranks share, are summed over them.
"""

import jax
import matplotlib.pyplot as plt
import numpy as np
from jax import numpy as jnp
from mpi4py import MPI

from ulysses_dp.jax import ulysses_attention

comm = MPI.COMM_WORLD
heads, width, rows = 4, 16, 256 // comm.size
mine = slice(comm.rank * rows, (comm.rank + 1) * rows)
rng = np.random.default_rng(0)  # the same numbers on every rank, of which each takes its rows


# %%
# Waves of some frequencies, with noise; the place in the series is a feature of its points.
def draw(batch):
    """This rank's rows of some series, and the waves to find."""
    place = np.linspace(0, 1, rows * comm.size)
    frequency, phase = rng.uniform(1, 3, (batch, 1)), rng.uniform(0, 2 * np.pi, (batch, 1))
    wave = np.sin(2 * np.pi * frequency * place + phase)
    noisy = wave + rng.standard_normal(wave.shape)
    waves = [np.broadcast_to(f(2 * np.pi * n * place), wave.shape) for n in (1, 2, 4) for f in (np.sin, np.cos)]
    series = np.stack([noisy, *waves, np.ones_like(wave)], axis=-1).astype(np.float32)
    return series[:, mine], wave[:, mine].astype(np.float32)


def model(weights, series):
    """One layer of attention."""
    q, k, v = jnp.moveaxis((series @ weights["project"]).reshape(*series.shape[:2], 3, heads, width), 2, 0)
    out = ulysses_attention(q, k, v, comm=comm)
    return (out.reshape(*series.shape[:2], -1) @ weights["read"])[..., 0]


@jax.jit
def loss_and_gradient(weights, series, wave):
    """This rank's part of the mean square error, and its gradient."""
    return jax.value_and_grad(lambda w: ((model(w, series) - wave) ** 2).sum() / (wave.size * comm.size))(weights)


# %%
# Training with Adam: the callbacks of a step run on all ranks in the same order, and are over before the sums over ranks.
shapes = {"project": (8, 3 * heads * width), "read": (heads * width, 1)}
weights = {name: 0.3 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
mean, square = ({name: np.zeros_like(x) for name, x in weights.items()} for _ in range(2))
losses = []
for step in range(1, 201):
    loss, gradient = jax.block_until_ready(loss_and_gradient(weights, *draw(8)))
    for name, x in gradient.items():
        total = comm.allreduce(np.asarray(x))
        mean[name] = 0.9 * mean[name] + 0.1 * total
        square[name] = 0.999 * square[name] + 0.001 * total**2
        change = mean[name] / (1 - 0.9**step) / (np.sqrt(square[name] / (1 - 0.999**step)) + 1e-8)
        weights[name] = weights[name] - 0.01 * change
    losses.append(comm.allreduce(float(loss)))

# %%
# New series.
series, wave = draw(8)
found = jax.block_until_ready(jax.jit(model)(weights, series))
parts = [np.concatenate(comm.allgather(np.asarray(x)[0])) for x in (series[..., 0], wave, found)]
if comm.rank == 0:
    print(f"mean square error {losses[0]:.3f} -> {losses[-1]:.3f}, of noise 1")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    left.semilogy(losses)
    left.set(xlabel="step", title="mean square error")
    for x, style, label in zip(parts, (".", "-", "-"), ("noisy", "wave", "found"), strict=True):
        right.plot(x, style, label=label)
    right.set(title="a new series")
    right.legend()
    figure.savefig("training_jax.png", dpi=100)
