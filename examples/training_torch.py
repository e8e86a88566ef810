"""
Train through PyTorch's autograd
================================

The same kind of regression with PyTorch: attention over ranks is one operation of autograd, and the optimiser is
PyTorch's.

``ulysses_dp.torch`` has ``ulysses_attention`` as such an operation.
The model here is a layer that has to find, for each point of a series, the value where a marker stood. Its gradients
are summed over the ranks, because all ranks share its weights.
"""

import matplotlib.pyplot as plt
import torch
from mpi4py import MPI

from ulysses_dp.torch import ulysses_attention

comm = MPI.COMM_WORLD
heads, width, rows = 4, 16, 256 // comm.size
torch.manual_seed(0)  # the same weights on every rank
project = torch.nn.Linear(3, 3 * heads * width)
read = torch.nn.Linear(heads * width, 1)
parameters = [*project.parameters(), *read.parameters()]
optimiser = torch.optim.Adam(parameters, lr=0.01)


# %%
# Series of 256 points: noise, and one marked point, on whichever rank. Every point should say the value that is marked.
def draw(batch, seed):
    """This rank's rows of some series, and the values to find."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, rows * comm.size, generator=generator)
    marked = torch.zeros_like(value)
    marked[torch.arange(batch), torch.randint(value.shape[1], (batch,), generator=generator)] = 1
    goal = (value * marked).sum(dim=1, keepdim=True).expand_as(value)
    series = torch.stack([value, marked, torch.ones_like(value)], dim=-1)
    mine = slice(comm.rank * rows, (comm.rank + 1) * rows)
    return series[:, mine], goal[:, mine]


def model(series):
    """One layer of attention."""
    q, k, v = project(series).reshape(*series.shape[:2], 3, heads, width).unbind(dim=2)
    return read(ulysses_attention(q, k, v, comm=comm).flatten(2))[..., 0]


# %%
# Training: backward is collective, like forward.
losses = []
for step in range(150):
    series, goal = draw(8, step)
    loss = ((model(series) - goal) ** 2).sum() / (8 * rows * comm.size)
    optimiser.zero_grad()
    loss.backward()
    for parameter in parameters:
        comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
    optimiser.step()
    losses.append(comm.allreduce(loss.item()))

# %%
# New series.
series, goal = draw(64, 10**6)
with torch.no_grad():
    found = model(series)
if comm.rank == 0:
    print(f"mean square error {losses[0]:.3f} -> {losses[-1]:.4f}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    left.semilogy(losses)
    left.set(xlabel="step", title="mean square error")
    right.plot(goal[:, 0], found[:, 0], ".")
    right.set(xlabel="marked value", ylabel="found by the first point", title="64 new series")
    figure.savefig("training_torch.png", dpi=100)
