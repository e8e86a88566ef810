"""Meshes of ranks: rings of Ulysses groups, as calls make them by a number, or made once and passed to calls."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np

from ._call.checks import check_integer
from ._ranks import mpi
from ._ranks.agree import Checked, Common, agree


class Mesh:
    """The ranks of a communicator as rings of Ulysses groups: consecutive ranks are a group, those in one place of each a ring.

    Collective over `comm`. What takes ``ring=`` makes such a mesh by itself, from a number. To make it before is for programs
    that want to see who is where, or to communicate within a group or a ring themselves. It belongs to its communicator alone:
    there is no global state, and any number of meshes can be in use.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; ``MPI.COMM_WORLD`` by default. Where a mesh is passed as ``ring=``, it is the communicator of the call, too.
    ring : int
        How many groups there are; it divides the number of ranks.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    shape : (int, int)
        Groups, and ranks of a group.
    coordinates : (int, int)
        The group of this rank, which is its place in its ring, and its place in its group.
    ulysses_comm : mpi4py.MPI.Intracomm
        The group of this rank, for the program to use: calls of this package have communicators of their own.
    ring_comm : mpi4py.MPI.Intracomm
        The ring of this rank, for the program to use.

    Raises
    ------
    TypeError, ValueError
        On all ranks, if on any rank `ring` is not an integer or does not divide the ranks, or if the ranks disagree on it.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from ulysses_dp import Mesh
    >>> mesh = Mesh(MPI.COMM_SELF, ring=1)
    >>> mesh
    Mesh of 1 group of 1 rank, seen from place 0 of group 0
    >>> mesh.ranks.tolist()
    [[0]]
    >>> mesh.free()
    """

    def __init__(self, comm: Any = None, *, ring: SupportsIndex) -> None:
        ranks = mpi.resolve_comm("Mesh", comm)

        # Validate inputs.
        def check() -> Checked[int]:
            size = check_ring(ring, ranks)
            return Checked((), Common("Mesh", {"ring": size}), size)

        groups = agree(ranks, "Mesh", check).result
        # Delegate.
        ranks.mesh(groups)
        self.comm, self.shape = mpi.communicator(comm), (groups, ranks.size // groups)
        self.coordinates: tuple[int, int] = divmod(ranks.rank, self.shape[1])
        self.ulysses_comm, self.ring_comm = mpi.split_in_two(ranks, self.coordinates)
        self._of = ranks

    @property
    def ranks(self) -> np.ndarray:
        """The numbers of the ranks: a row for each group, a column for each ring."""
        return np.arange(self._of.size).reshape(self.shape)

    def free(self) -> None:
        """Free the communicators of the mesh, but not that of its ranks. Collective; the mesh is not used afterwards."""
        self.ulysses_comm.Free()
        self.ring_comm.Free()

    def __repr__(self) -> str:
        groups, size = self.shape
        group, place = self.coordinates
        of = f"{groups} group{'s' * (groups > 1)} of {size} rank{'s' * (size > 1)}"
        return f"Mesh of {of}, seen from place {place} of group {group}"


RingSize = SupportsIndex | str | Mesh  # what says how many groups there are


def ranks_of(function: str, comm: Any, ring: Any, name: str = "comm") -> mpi.Ranks:
    """The ranks of a call: those of a communicator, or of a mesh where none is given."""
    return mpi.resolve_comm(function, ring.comm if comm is None and isinstance(ring, Mesh) else comm, name)


def check_ring(ring: Any, ranks: mpi.Ranks | int, heads: int | None = None) -> int:
    """How many groups there are; "auto", where there are heads, is the smallest number with which all ranks have as many."""
    if isinstance(ring, Mesh):
        if isinstance(ranks, int) or ring._of is not ranks:
            raise ValueError("ring must be a mesh of the communicator of the call, not of another one")
        return ring.shape[0]
    size = ranks if isinstance(ranks, int) else ranks.size
    if isinstance(ring, str):
        if ring != "auto" or heads is None:
            auto = "" if heads is None else " or 'auto'"
            raise ValueError(f"ring must be an integer or a Mesh{auto}, not {ring!r}")
        return next(groups for groups in range(1, size + 1) if size % groups == 0 and heads % (size // groups) == 0)
    check_integer("ring", ring)
    if ring < 1 or size % ring:
        raise ValueError(f"ring must divide the {size} ranks, which {ring} does not")
    return int(ring)
