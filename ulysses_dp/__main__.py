"""``python -m ulysses_dp`` prints what this process would run on; under mpiexec, every rank in turn."""

from ._ranks.mpi import gather_text
from .doctor import report

if __name__ == "__main__":
    text = gather_text(report())
    if text:
        print(text)
