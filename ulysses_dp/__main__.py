"""``python -m ulysses_dp`` prints what this process would run on; under mpiexec, every rank in turn.

With ``--check`` it computes with every kernel that the device would get, and by every way between the ranks, and compares.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

from ._device.queue import default_queue, local_rank
from ._ranks import mpi
from .doctor import known_of, report

SETTINGS = ("CL_CONFIG_", "FI_", "I_MPI_", "MPICH_", "OCL_ICD_", "OMPI_", "ONEAPI_", "SYCL_", "ULYSSES_DP_", "UR_", "ZE_")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ulysses_dp", description="What a process would run on, and whether it is right."
    )
    parser.add_argument("--check", action="store_true", help="compute with every kernel of this device, and on all ranks")
    parser.add_argument("--report", type=Path, metavar="FILE", help="with --check: write what an issue needs here")
    parser.add_argument("--seconds", type=float, default=120.0, help="with --check: the most that one check may take (120)")
    arguments = parser.parse_args()
    if not arguments.seconds > 0:
        parser.error(f"--seconds must be positive, got {arguments.seconds}")
    if arguments.report is not None and not arguments.check:
        parser.error("--report needs --check")
    return arguments


def check(arguments: argparse.Namespace) -> int:
    """Check everything, print the table, write the report: the exit code, which is 1 if something is wrong."""
    from .check import HEADER, check_exchange, check_kernels, joined, line

    if local_rank() == 0:
        print(f"every kernel of this device, at most {arguments.seconds:g} s each …", file=sys.stderr, flush=True)
    mine = check_kernels(arguments.seconds)  # before MPI starts, which need not bear new processes
    results, parts = joined(mpi.gathered(mine) or [mine]), mpi.gather_text(_situation())
    text: list[str] = []

    def say(*lines: str) -> None:
        """On rank 0, print, and write all that there is: the next check may end the job."""
        if not mpi.is_first():
            return
        print(*lines, sep="\n", flush=True)
        text.extend(lines)
        if arguments.report is not None:
            details = [f"--- {x.name} {x.by}\n{x.details}" for x in results if x.details]
            arguments.report.write_text("\n".join([parts, "", *text, *details]) + "\n", encoding="utf-8")

    say(HEADER, *map(line, results))
    if mpi.library_version().startswith("none found"):
        say("the exchange was not checked: no MPI library")
    else:
        for result in check_exchange(arguments.seconds):
            of_ranks: Any = mpi.gathered([result])
            results += joined(of_ranks) if of_ranks else []
            if of_ranks:
                say(line(results[-1]))
    say(f"kernels of this device: {known_of(default_queue().sycl_device)}")
    wrong = sum(not x.right for x in results)
    say(f"{wrong} of {len(results)} checks are not right" if wrong else f"all {len(results)} checks are right")
    return int(wrong > 0)


def _situation() -> str:
    """What `report` says, and the system and settings around it."""
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    return "\n".join([report(), f"system   {platform.platform()}, Python {platform.python_version()}", *settings])


if __name__ == "__main__":
    options = parse_arguments()
    if options.check:
        sys.exit(check(options))
    text = mpi.gather_text(report())
    if text:
        print(text)
