"""The communicator, and what keeps ranks in lockstep: the same examples on all, and no rank waits for one that failed."""

import sys
import zlib
from collections import defaultdict

import pytest
from checks import distributed, local
from hypothesis import HealthCheck, Phase, settings
from mpi4py import MPI

from ulysses_dp import free_workspace
from ulysses_dp._device import workspace
from ulysses_dp._device.arrays import tensor

WORLD = MPI.COMM_WORLD

# Shrinking a failure, and the health checks that look at the clock, would take different paths on different ranks.
phases = [Phase.explicit, Phase.generate] + ([Phase.shrink] if WORLD.size == 1 else [])
settings.register_profile(
    "lockstep", derandomize=True, database=None, deadline=None, phases=phases, suppress_health_check=list(HealthCheck)
)
settings.load_profile("lockstep")


@pytest.fixture(scope="session")
def comm():
    """All ranks of the test run."""
    return WORLD


@pytest.fixture(params=[pytest.param(local, marks=pytest.mark.single), distributed], ids=["local", "distributed"])
def functions(request, comm):
    """Both kinds of functions; under mpiexec those of one rank have nothing to do with the other ranks."""
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """All memory that calls get is new and full of nan: what they do not write shows up."""
    allocate = workspace._allocate

    def poison(*arguments):
        memory = allocate(*arguments)
        tensor.usm_ndarray((memory.nbytes,), dtype="u1", buffer=memory)[...] = 255
        return memory

    free_workspace()
    monkeypatch.setattr(workspace, "_allocate", poison)
    monkeypatch.setattr(workspace, "_REFERENCES_OF_POOL", None)  # nothing is found to be given back
    yield
    free_workspace()


def pytest_addoption(parser):
    """`--share 0/2`, and elsewhere `--share 1/2`: what takes long is split between two runs."""
    parser.addoption("--share", metavar="K/N", help="of the sets of parameters of every test only one N-th, the K-th from 0")


def pytest_collection_modifyitems(config, items):
    """Every test takes part in every share. The sets of parameters are chosen by their names, the same on all ranks."""
    if not config.option.share:
        return
    share, shares = map(int, config.option.share.split("/"))
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for sets in tests.values():
        kept.update([item for item in sets if zlib.crc32(item.nodeid.encode()) % shares == share] or sets)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Rank 0 alone prints and writes the cache; the others speak up only where they fail."""
    if WORLD.rank > 0:
        for name in ("terminalreporter", "lfplugin", "nfplugin"):
            config.pluginmanager.unregister(name=name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    """A failed test ends the run on all ranks."""
    _abort_if_failed(report)


@pytest.hookimpl(tryfirst=True)
def pytest_collectreport(report):
    """A module that cannot be imported ends the run on all ranks."""
    _abort_if_failed(report)


def _abort_if_failed(report):
    if WORLD.size == 1 or not report.failed:
        return
    captured = "".join(f"\n--- {title} ---\n{text}" for title, text in report.sections)
    for line in f"{report.nodeid} failed\n{report.longreprtext}{captured}".splitlines():
        print(f"[rank {WORLD.rank}] {line}", file=sys.stderr)
    sys.stderr.flush()
    WORLD.Abort(1)
