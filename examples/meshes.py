"""
Who is where on a mesh
======================

All meshes of the ranks at hand: groups of ranks that share the heads, and rings of ranks around which keys travel.

Run it with ``mpiexec -n 4``, or any number of ranks. A ``Mesh`` knows the group and the place of every rank, and has the
communicators of both; ``row_positions`` says which rows a rank holds, here in zigzag order.
"""

import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI

from ulysses_dp import Mesh, row_positions

comm = MPI.COMM_WORLD
seq = 8 * comm.size
meshes = [Mesh(comm, ring=ring) for ring in range(1, comm.size + 1) if comm.size % ring == 0]

# %%
# The rows of every rank, on every mesh. A mesh is passed as the number of its groups would be, and stands for its ranks, too.
rows = [comm.allgather(row_positions(seq, order="zigzag", ring=mesh)) for mesh in meshes]


def as_text(numbers):
    """Rows as ranges."""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{part[0]}–{part[-1]}" for part in parts)


# %%
# A row of the picture is a group, whose ranks have the rows of the sequence there and share the heads. A column is a ring.
if comm.rank == 0:
    figure, panels = plt.subplots(1, len(meshes), figsize=(4 * len(meshes), 4), layout="constrained", squeeze=False)
    for axes, mesh, held in zip(panels[0], meshes, rows, strict=True):
        groups, size = mesh.shape
        for (group, place), rank in np.ndenumerate(mesh.ranks):
            axes.add_patch(plt.Rectangle((place + 0.05, group + 0.1), 0.9, 0.65, color=plt.colormaps["Pastel1"](group % 9)))
            axes.text(place + 0.5, group + 0.42, f"rank {rank}\n{as_text(held[rank])}", ha="center", va="center")
            if groups > 1:
                axes.annotate("", (place + 0.5, group + 1.08), (place + 0.5, group + 0.77), arrowprops={"arrowstyle": "->"})
        axes.set(xlim=(0, size), ylim=(groups + 0.15, 0), title=f"ring={groups}: {size} x {groups}")
        axes.axis("off")
        print(f"ring={groups}: groups {mesh.ranks.tolist()}, rings {mesh.ranks.T.tolist()}")
    figure.savefig("meshes.png", dpi=100)

for mesh in meshes:
    mesh.free()
