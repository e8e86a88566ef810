"""Install the wheel in fresh environments and run the smoke test there on 3 ranks; before that, look at what was built.

    python packaging/try_wheel.py --pythons    # the newest versions, on every supported Python found
    python packaging/try_wheel.py --stacks     # other versions and other MPI libraries

`make dist` and `make stacks` build the wheel and call this. An environment takes about 3 GB while it is tried. Exits with 1 if
something is wrong, after all have been tried.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = tuple(f"3.{n}" for n in range(10, 15))
NEWEST = "3.11"  # the Python of the stacks that do not say another
# what is installed beside the wheel, and the Python for it
STACKS = {
    "newest": (NEWEST, ["impi-rt"]),
    "Aurora's module": ("3.12", ["dpctl==0.21.1", "dpnp==0.19.1", "dpcpp-cpp-rt==2025.3.*", "impi-rt"]),
    "MPICH": (NEWEST, ["mpich"]),
    "Open MPI": (NEWEST, ["openmpi"]),
}
# Open MPI refuses root and more ranks than cores unless told
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def find_pythons() -> dict[str, str]:
    """The supported Pythons that start, by version: on PATH, or installed by pyenv."""
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in SUPPORTED:
        candidates = [shutil.which(f"python{version}"), *sorted(installed.glob(f"{version}.*/bin/python"), reverse=True)]
        for path in filter(None, candidates):
            if subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
                found[version] = str(path)
                break
    return found


def check_contents(wheel: Path, sdist: Path) -> None:
    """The wheel holds the modules, the SPIR-V and the licence; the sdist what the wheel is built from."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ulysses_dp").rglob("*.py")}
    compiled = {f"kernels/spirv/{path.name}" for path in (ROOT / "kernels/spirv").iterdir()}
    kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} | compiled
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    expected = modules | {f"ulysses_dp/{name}" for name in kernels} | {"ulysses_dp/py.typed"}
    for what, lacks, has in (
        ("wheel", (expected | {f"{info}/licenses/LICENSE"}) - inside, {x for x in inside if not x.startswith(info)} - expected),
        ("sdist", (modules | kernels | {"LICENSE", "README.md", "setup.py", "pyproject.toml"}) - source, set()),
    ):
        if lacks or has:
            raise SystemExit(f"the {what} lacks {sorted(lacks)} and should not have {sorted(has)}")
    size = wheel.stat().st_size / 1e6
    print(f"contents: {len(inside)} files in the wheel, {len(compiled)} of them compiled kernels, {size:.1f} MB", flush=True)


def try_wheel(name: str, python: str, wheel: Path, requirements: list[str]) -> bool:
    """Install in a fresh environment and run the smoke test; print one line, and more where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        binaries = Path(folder) / "bin"
        options = {"capture_output": True, "text": True, "check": False, "cwd": folder, "env": os.environ | ENVIRONMENT}
        for command in (
            [binaries / "pip", "install", "--quiet", wheel, *requirements],
            [binaries / "pip", "check"],
            ["timeout", "-k", "10", "300", binaries / "mpiexec", "-n", "3", binaries / "python", ROOT / "packaging/smoke.py"],
        ):
            done = subprocess.run(list(map(str, command)), **options)
            if done.returncode:
                print(f"{name}: FAILED: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}", flush=True)
                return False
        print(f"{name}: {done.stdout.strip()}", flush=True)
        return True


def main() -> None:
    """Try the wheel in dist/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of one wheel and one sdist")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pythons", action="store_true", help="the newest versions on every supported Python found")
    what.add_argument("--stacks", action="store_true", help=", ".join(STACKS))
    arguments = parser.parse_args()
    wheels, sdists = sorted(arguments.dist.glob("*.whl")), sorted(arguments.dist.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        parser.error(f"--dist must hold one wheel and one sdist, got {len(wheels)} and {len(sdists)}")
    check_contents(wheels[0], sdists[0])
    pythons = find_pythons()
    if arguments.pythons:
        tries = {f"Python {version}": (version, ["impi-rt"]) for version in SUPPORTED}
    else:
        tries = STACKS
    right = True
    for name, (version, requirements) in tries.items():
        if version in pythons:
            right &= try_wheel(name, pythons[version], wheels[0].resolve(), requirements)
        else:
            print(f"{name}: not tried, no Python {version} found")
    sys.exit(not right)


if __name__ == "__main__":
    main()
