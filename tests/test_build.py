"""What a user installs: the sdist and the wheel, built from the files under version control alone."""

import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ulysses_dp.kernels import constants, manifest

pytestmark = pytest.mark.single

ROOT = Path(__file__).parents[1]


def run(*command, cwd, code=0):
    """Run a command and return all that it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source tree as a clone has it: without compiled kernels."""
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    folder = tmp_path_factory.mktemp("clone")
    for name in names:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    assert not (folder / "kernels/spirv").exists()
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """The folder of the sdist and of the wheel that is built from it, with the kernels that the installation compiled.

    Without an environment of its own, whose packages are needed for compiling alone and take a minute to install.
    """
    clone = shutil.copytree(source, tmp_path_factory.mktemp("built") / "clone")
    shutil.copytree(manifest.FOLDER, clone / "kernels/spirv")
    run(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", "dist", cwd=clone)
    return clone / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    """The files in the wheel by name."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(built):
    """The files in the sdist by name, without its top folder."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}


def test_names(built):
    name = f"ulysses_dp-{importlib.metadata.version('ulysses_dp')}"
    assert {path.name for path in built.iterdir()} == {f"{name}.tar.gz", f"{name}-py3-none-any.whl"}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "ulysses_dp").rglob("*.py")}
    expected |= {f"ulysses_dp/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected |= {f"ulysses_dp/kernels/spirv/{path.name}" for path in manifest.FOLDER.iterdir()} | {"ulysses_dp/py.typed"}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("where", ["wheel", "sdist"])
def test_kernels_are_those_of_the_sources(where, request):
    files, folder = request.getfixturevalue(where), {"wheel": "ulysses_dp/kernels", "sdist": "kernels"}[where]
    listed = json.loads(files[f"{folder}/spirv/manifest.json"])
    assert listed["kernels"].keys() == manifest.read().keys()
    assert {f"{folder}/spirv/{name}.spv" for name in listed["kernels"]} <= set(files)
    for name, digest in listed["sources"].items():
        assert hashlib.sha256(files[f"{folder}/{name}"]).hexdigest() == digest


@pytest.mark.compiles
def test_compiling_again_gives_the_same_bytes(source, tmp_path):
    clone = shutil.copytree(source, tmp_path / "clone")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", "dist", cwd=clone)
    (wheel,) = (clone / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for path in manifest.FOLDER.iterdir():
            assert archive.read(f"ulysses_dp/kernels/spirv/{path.name}") == path.read_bytes(), path.name


def test_metadata(wheel):
    (text,) = (content.decode() for name, content in wheel.items() if name.endswith(".dist-info/METADATA"))
    required = [line.removeprefix("Requires-Dist: ") for line in text.splitlines() if line.startswith("Requires-Dist: ")]
    assert not any("numba" in line for line in required)
    for name in ("dpctl", "dpnp", "mpi4py", "numpy"):
        assert any(line.startswith(name) and "extra ==" not in line for line in required)
    assert "Requires-Python: >=3.10" in text
    assert "# ulysses_dp" in text


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff", "packaging/conda/recipe.yaml", "packaging/spack/package.py"])
def test_every_file_names_the_version_of_setup(name):
    version = importlib.metadata.version("ulysses_dp")
    assert version in re.findall(r"(?<![\d.])\d+\.\d+\.\d+(?![\d.])", (ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["packaging/conda/recipe.yaml", "packaging/spack/package.py"])
def test_recipes_require_what_the_package_does(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    required = [x for x in importlib.metadata.requires("ulysses_dp") if "extra ==" not in x]
    for package, _, least in (x.partition(">=") for x in required):
        assert re.search(rf"\b{package}( >=|@)?{least}\b", text), package


# setup.py as another Python version runs it
OTHER_PYTHON = """if True:
    import runpy, sys
    import setuptools
    sys.version_info, sys.version = (3, 12, 4, "final", 0), "3.12.4 (main)"
    sys.argv = ["setup.py", "--quiet", "build_spirv"]
    runpy.run_path("setup.py", run_name="__main__")
"""


def test_other_python_without_kernels(source, tmp_path):
    clone = shutil.copytree(source, tmp_path / "clone", ignore=shutil.ignore_patterns("spirv"))
    message = run(sys.executable, "-c", OTHER_PYTHON, cwd=clone, code=1)
    assert message == (
        "ulysses_dp: the kernels are not compiled yet, and compiling them needs CPython 3.11 (this is 3.12.4): "
        "build a wheel or an sdist with Python 3.11, which then installs on any version.\n"
    )


def test_other_python_with_the_kernels_of_an_sdist(sdist, tmp_path):
    for name, content in sdist.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert run(sys.executable, "-c", OTHER_PYTHON, cwd=tmp_path) == ""


def test_kernels_have_one_name():
    """The entry point calls the kernel by its own name: Intel's compiler for GPUs makes two functions of two names."""
    entry_point, decorate, linkage, exported = 15, 71, 41, 0
    for kernel, entry in manifest.read().items():
        names, links = [], []
        for opcode, operands in constants.instructions(np.fromfile(manifest.FOLDER / f"{kernel}.spv", np.uint32)):
            if opcode == entry_point:
                names.append(operands[2:])
            elif opcode == decorate and operands[1] == linkage and operands[-1] == exported:
                links.append(operands[2:-1])
        texts = [[np.asarray(x, np.uint32).tobytes().partition(b"\0")[0] for x in found] for found in (names, links)]
        assert texts[0] == [entry["entry"].encode()] == [x for x in texts[1] if not x.startswith(b"_ZN08NumbaEnv")], kernel
