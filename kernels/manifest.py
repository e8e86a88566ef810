"""The list of compiled kernels: what the build writes beside the SPIR-V and the launcher reads.

The manifest holds the hash of every source that a kernel is made of, so that SPIR-V older than its source is an error and
never a silently stale kernel.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "spirv"
_FILE = "manifest.json"
_SOURCES = (
    "compile.py",
    "flash_backward.py",
    "flash_backward_gpu.py",
    "flash_forward.py",
    "flash_forward_gpu.py",
    "intrinsics.py",
    "relayout.py",
    "row_dot.py",
    "subgroup.py",
)


def _source_hashes() -> dict[str, str]:
    return {name: hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in _SOURCES}


def write(folder: Path, kernels: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of `kernels`: per name entry point, build options by backend, arguments and constants."""
    (folder / _FILE).write_text(json.dumps({"sources": _source_hashes(), "kernels": kernels}, indent=1) + "\n")


@cache
def read() -> dict[str, dict[str, Any]]:
    """The compiled kernels by name.

    Raises
    ------
    RuntimeError
        There is no SPIR-V, or a kernel source changed after its SPIR-V was built.
    """
    path = FOLDER / _FILE
    if not path.exists():
        raise RuntimeError(f"no compiled kernels in {FOLDER}: install the package (pip install .), or run `make kernels`")
    manifest = json.loads(path.read_text())
    changed = sorted(name for name, digest in _source_hashes().items() if manifest["sources"].get(name) != digest)
    if changed:
        raise RuntimeError(
            f"the compiled kernels are older than {', '.join(changed)}: run `make kernels`, or install the package again"
        )
    return manifest["kernels"]
