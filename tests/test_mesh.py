"""Meshes that are made once: who is where, their communicators, and calls that are given one."""

import numpy as np
import pytest
from helpers import needs_ranks, outcomes, random_qkv
from mpi4py import MPI
from oracle import dense_attention

from ulysses_dp import (
    LongContextAttention,
    Mesh,
    UlyssesAttention,
    row_positions,
    shard_rows,
    ulysses_attention,
    ulysses_attention_backward,
    ulysses_flash_attn_func,
    unshard_rows,
)


def rings(comm):
    return [ring for ring in range(1, comm.size + 1) if comm.size % ring == 0]


def test_who_is_where(comm):
    for ring in rings(comm):
        mesh = Mesh(comm, ring=ring)
        group, place = mesh.coordinates
        assert mesh.shape == mesh.ranks.shape == (ring, comm.size // ring)
        assert mesh.ranks[group, place] == comm.rank
        assert mesh.comm is comm
        for of, ranks, mine in ((mesh.ulysses_comm, mesh.ranks[group], place), (mesh.ring_comm, mesh.ranks[:, place], group)):
            assert of.allgather(comm.rank) == ranks.tolist()
            assert of.rank == mine
        assert f"place {place} of group {group}" in repr(mesh)
        mesh.free()
        assert mesh.ulysses_comm == mesh.ring_comm == MPI.COMM_NULL


def test_calls_take_it_for_the_number_and_for_the_ranks(comm):
    q, k, v = random_qkv(0, 1, 24, 4, 2, 8)
    expected, _ = dense_attention(q, k, v, causal=True)
    for ring in rings(comm):
        mesh = Mesh(comm, ring=ring)
        how = {"ring": mesh, "order": "zigzag"}
        rows = row_positions(24, **how)
        np.testing.assert_array_equal(rows, row_positions(24, comm, ring=ring, order="zigzag"))
        mine = [shard_rows(x, **how) for x in (q, k, v)]
        out, lse, ctx = ulysses_attention(*mine, causal=True, return_lse=True, return_ctx=True, **how)
        results = [
            out,
            ulysses_attention(*mine, comm=comm, causal=True, **how),
            ulysses_flash_attn_func(*mine, causal=True, **how),
            UlyssesAttention(ring=mesh, order="zigzag")(*mine, causal=True),
            LongContextAttention(ring_impl_type="zigzag", ring=mesh)(*mine, causal=True),
        ]
        for result in results:
            np.testing.assert_allclose(result, expected[:, rows], atol=1e-5)
        np.testing.assert_array_equal(unshard_rows(mine[0], **how), q)
        with_context = ulysses_attention_backward(out, *mine, out, lse, ring=mesh, ctx=ctx)
        without = ulysses_attention_backward(out, *mine, out, lse, causal=True, **how)
        for x, y in zip(with_context, without, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
        mesh.free()


def test_those_of_two_communicators_are_apart(comm):
    """Several are alive at once, of the same ranks and of others."""
    other, half = comm.Dup(), comm.Split(comm.rank % 2, comm.rank)
    meshes = [Mesh(ranks, ring=ranks.size) for ranks in (comm, other, half)]
    x = np.ones((1, 4, 2, 8), np.float32)
    for mesh in meshes:
        np.testing.assert_allclose(ulysses_attention(x, x, x, ring=mesh), x)
        assert mesh.ring_comm.size == mesh.comm.size
    for kind, text in outcomes(comm, lambda: ulysses_attention(x, x, x, comm=comm, ring=meshes[1])):
        assert kind is ValueError
        assert "ring must be a mesh of the communicator of the call" in text
    for mesh in meshes:
        mesh.free()
    other.Free()
    half.Free()


@pytest.mark.parametrize(
    ("ring", "error", "message"),
    [
        (7, ValueError, "ring must divide"),
        (0, ValueError, "ring must divide"),
        (1.0, TypeError, "ring must be an integer"),
        ("auto", ValueError, "ring must be an integer or a Mesh, not 'auto'"),
        (None, TypeError, "ring must be an integer"),
    ],
)
def test_bad_numbers(comm, ring, error, message):
    for call in (lambda: Mesh(comm, ring=ring), lambda: row_positions(8, comm, ring=ring)):
        for kind, text in outcomes(comm, call):
            assert kind is error
            assert message in text


@needs_ranks
def test_another_number_on_every_rank(comm):
    for kind, text in outcomes(comm, lambda: Mesh(comm, ring=1 if comm.rank else comm.size)):
        assert kind is ValueError
        assert "ring must be the same on all ranks" in text
