"""The list of compiled kernels: what the build writes beside the SPIR-V and the launcher reads.

The manifest holds the hash of every file that the build used to make a kernel, so that SPIR-V older than its source is an error
and never a silently stale kernel. The launchers are in other files: a change of these changes no kernel.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

FOLDER = Path(__file__).parent / "spirv"
_FILE = "manifest.json"


def _hash(source: str) -> str:
    path = Path(__file__).with_name(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def write(folder: Path, kernels: dict[str, dict[str, Any]], sources: Collection[str]) -> None:
    """Write the manifest of `kernels`, per name entry point, build options by backend, arguments and constants; and of the
    files that they were made of."""
    hashes = {source: _hash(source) for source in sorted(sources)}
    (folder / _FILE).write_text(json.dumps({"sources": hashes, "kernels": kernels}, indent=1) + "\n")


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
    changed = [source for source, digest in manifest["sources"].items() if _hash(source) != digest]
    if changed:
        raise RuntimeError(
            f"the compiled kernels are older than {', '.join(changed)}: run `make kernels`, or install the package again"
        )
    return manifest["kernels"]
