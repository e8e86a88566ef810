"""Descriptions of machines for `plan`: how fast a rank computes, copies and sends, and where each figure is from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ._call.checks import check_flag, check_integer


@dataclass(frozen=True)
class Level:
    """Ranks that are this close to each other, and the way between those of them that share no closer level."""

    ranks: int | None  #: so many consecutive ranks; None: any number
    latency: float  #: seconds that a message costs its sender, and its receiver
    bandwidth: float  #: bytes per second that a rank sends, while all ranks send and receive


@dataclass(frozen=True)
class Machine:
    """A machine on which `plan` predicts times: speeds, memory and links, each with its source.

    Not collective. `scripts/plan.py --measure` writes the description of the machine at hand.

    Parameters
    ----------
    name : str
        What tables and messages call it.
    device : {"cpu", "gpu"}
        Which kernels run, and so which copies they need.
    shared : bool
        The ranks of the machine share one device, such as a CPU: the memory and all speeds are those of the whole machine, of
        which each rank gets its part. Otherwise every rank has a device of its own, and they are those of one rank.
    measured : bool
        Whether this package ran on the machine to get the figures.
    memory : float
        Bytes.
    flops, backward_flops : dict of str to float
        Floating-point operations per second of attention and of its gradient, by dtype. Counted are those of the products that
        are needed: two forward, five backward.
    copy_bandwidth : float
        Bytes per second that a relayout reads and writes, added up.
    stage_seconds : float
        What any stage of a call costs, however small.
    call_seconds : float
        What a call costs outside its stages: checks, and the agreement of the ranks.
    levels : tuple of ulysses_dp.machine.Level
        The links from near to far; none if the machine has one rank only. The last one holds all ranks of the machine.
    sources : dict of str to str
        Where the figures are from, by the name of the field.

    Raises
    ------
    TypeError, ValueError
        A field is not of its type or not positive, or the levels do not hold one another.

    Examples
    --------
    >>> from ulysses_dp import Machine
    >>> laptop = Machine("laptop", "cpu", True, False, 16e9, {"float32": 1e11}, {}, 1e10, 1e-4, 1e-3, ())
    >>> Machine.from_json(laptop.to_json()) == laptop
    True
    """

    name: str
    device: str
    shared: bool
    measured: bool
    memory: float
    flops: dict[str, float]
    backward_flops: dict[str, float]
    copy_bandwidth: float
    stage_seconds: float
    call_seconds: float
    levels: tuple[Level, ...]
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "gpu"):
            raise ValueError(f"device must be 'cpu' or 'gpu', not {self.device!r}")
        check_flag("shared", self.shared)
        check_flag("measured", self.measured)
        figures = {name: getattr(self, name) for name in ("memory", "copy_bandwidth", "stage_seconds", "call_seconds")}
        for name in ("flops", "backward_flops"):
            figures |= {f"{name} of {dtype}": speed for dtype, speed in getattr(self, name).items()}
        inside = 1
        for number, level in enumerate(self.levels):
            figures |= {f"{name} of level {number}": getattr(level, name) for name in ("latency", "bandwidth")}
            if level.ranks is None and level is self.levels[-1]:
                break
            check_integer(f"ranks of level {number}", level.ranks)
            size = level.ranks or 0
            if size <= inside or size % inside:
                raise ValueError(f"ranks of level {number} must be a multiple of the {inside} of the level below, not {size}")
            inside = size
        for name, figure in figures.items():
            if not isinstance(figure, int | float):
                raise TypeError(f"{name} must be a number, not {type(figure).__name__}")
            if not figure > 0:
                raise ValueError(f"{name} must be positive, not {figure}")

    @property
    def ranks(self) -> int | None:
        """How many ranks it has; None: any number."""
        return self.levels[-1].ranks if self.levels else 1

    def to_json(self) -> str:
        """Write the description as the text of a JSON file.

        Returns
        -------
        str
            What `from_json` reads.
        """
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """The inverse of `to_json`; raises ValueError for anything else."""
        try:
            values = json.loads(text)
            unknown = set(values) - {entry.name for entry in fields(cls)}
            if unknown:
                raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
            return cls(**values | {"levels": tuple(Level(**level) for level in values["levels"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the description of a machine: {error}") from error


def find(machine: Any) -> Machine:
    """The machine that a user names: itself, one of `MACHINES`, or a file of `scripts/plan.py --measure`."""
    if isinstance(machine, Machine):
        return machine
    if not isinstance(machine, str | Path):
        raise TypeError(f"machine must be a Machine, a name or the path of a file, not {type(machine).__name__}")
    if machine in MACHINES:
        return MACHINES[str(machine)]
    try:
        return Machine.from_json(Path(machine).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        known = ", ".join(MACHINES)
        raise ValueError(
            f"machine must be one of {known}, or a file of scripts/plan.py --measure, not {machine}: {error}"
        ) from error


# Per rank, which is one tile of a Max 1550. The latency is a guess, the other figures are explained in docs/planning.md.
_GPU_LEVEL = Level(2, 10e-6, 269e9 / 2)
_NODE_LEVEL = Level(12, 10e-6, 143e9 / 12)
_GROUP_LEVEL = Level(64 * 12, 10e-6, 8 * 25e9 / 12)
_SYSTEM_LEVEL = Level(10624 * 12, 10e-6, 165 * 2 * 25e9 / 2 / (64 * 12))
# shares of multiply-adds in hot loops
_FLOAT64_ON_GPU, _GRADIENT_ON_GPU = 0.4, 0.85
_AURORA: dict[str, Any] = {
    "device": "gpu",
    "shared": False,
    "measured": False,
    "memory": 64 * 2**30,
    "flops": dict.fromkeys(("float32", "float16", "bfloat16"), 0.77 * 21e12) | {"float64": _FLOAT64_ON_GPU * 17e12},
    "backward_flops": dict.fromkeys(("float32", "float16", "bfloat16"), 5 / 7 * _GRADIENT_ON_GPU * 21e12)
    | {"float64": 5 / 8 * _FLOAT64_ON_GPU * 17e12},
    "copy_bandwidth": 1e12,
    "stage_seconds": 1e-4,
    "call_seconds": 1e-3,
    "sources": {
        "memory": "ALCF user guides: 768 GiB per node",
        "flops": "estimate: ALCF's peak of a tile, times the share of multiply-adds in the hot loop (scripts/gpu_report.py)",
        "backward_flops": "estimate: the same, for kernels that compute seven products where five would do",
        "copy_bandwidth": "ALCF user guides: triad of a tile; that a relayout reaches it is assumed",
        "stage_seconds": "assumed: about what it is on the CPU",
        "call_seconds": "assumed: about what it is on the CPU",
        "levels": "ALCF user guides: tile to tile, GPU to GPU, 8 NICs of 25 GB/s; arXiv:2512.04291: two links between groups; "
        "the latencies are guesses",
    },
}

MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            name="cpu-2-cores",
            device="cpu",
            shared=True,
            measured=True,
            memory=25276502016,
            flops={"float32": 3.59e11, "float64": 1.71e11, "float16": 3.86e11, "bfloat16": 3.91e11},
            backward_flops={"float32": 2.74e11, "float64": 8.83e10, "float16": 2.93e11, "bfloat16": 2.99e11},
            copy_bandwidth=3.07e10,
            stage_seconds=3.64e-05,
            call_seconds=0.000239,
            levels=(Level(ranks=None, latency=1e-06, bandwidth=1.37e10),),
            sources={"all": "scripts/plan.py --measure, 2 ranks, AMD EPYC (Zen 5, AVX-512)"},
        ),
        Machine(name="aurora-node", levels=(_GPU_LEVEL, _NODE_LEVEL), **_AURORA),
        Machine(name="aurora", levels=(_GPU_LEVEL, _NODE_LEVEL, _GROUP_LEVEL, _SYSTEM_LEVEL), **_AURORA),
    )
}
