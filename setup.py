"""The package: its metadata, and the compilation of the numba-dpex kernels to SPIR-V when it is built."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
SPIRV = ROOT / "kernels" / "spirv"
VERSION = "0.1.0"  # the only place; a test compares CHANGELOG.md, CITATION.cff and the recipes in packaging/


class BuildSpirv(Command):
    """Compile the kernels into kernels/spirv, from where they go into wheels, sdists and editable installs as package data.

    Compiling needs CPython 3.11, for which numba-dpex exists. On other versions SPIR-V that came in an sdist is taken.
    """

    description = "compile the numba-dpex kernels to SPIR-V"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None:
        self.editable_mode = False  # set by setuptools for `pip install -e`; the files are in place either way

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if self._up_to_date():
            return
        if sys.version_info[:2] != (3, 11):
            sys.exit(
                "ulysses_dp: the kernels are not compiled yet, and compiling them needs CPython 3.11 (this is "
                f"{sys.version.split()[0]}): build a wheel or an sdist with Python 3.11, which then installs on any version."
            )
        # dpctl 0.17 finds neither the Intel runtime libraries nor the CPU device of its own wheels by itself
        libraries = next(
            Path(file.locate()).resolve().parent
            for file in importlib.metadata.files("intel-cmplr-lib-rt")
            if file.name.startswith("libintlc.so")
        )
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(libraries), os.environ.get("LD_LIBRARY_PATH")])),
            "OCL_ICD_FILENAMES": str(libraries / "libintelocl.so"),
            "ONEAPI_DEVICE_SELECTOR": "opencl:cpu",
        }
        # not `-m`: the processes that compile would import such a module again
        command = "import pathlib, sys, kernels.compile; kernels.compile.main(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", command, str(SPIRV)], cwd=ROOT, env=environment, check=True)

    @staticmethod
    def _up_to_date() -> bool:
        spec = importlib.util.spec_from_file_location("manifest", ROOT / "kernels" / "manifest.py")
        manifest = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(manifest)
        try:
            manifest.read()
        except RuntimeError:
            return False
        return True

    # what setuptools asks a part of `build` for (setuptools.command.build.SubCommand)
    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py")]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class SdistWithSpirv(sdist):
    """An sdist carries the SPIR-V too, so that it installs on Python versions for which numba-dpex does not exist."""

    def run(self) -> None:
        self.run_command("build_spirv")
        super().run()


# before build_py, which copies the package data
build.sub_commands = [("build_spirv", None), *build.sub_commands]

# what older ones, outside of the build environment, would warn of
LICENCE = {"license_expression" if int(setuptools.__version__.partition(".")[0]) >= 77 else "license": "Apache-2.0"}

setup(
    name="ulysses_dp",
    version=VERSION,
    author="The ulysses_dp developers",
    **LICENCE,
    keywords="attention sequence-parallel MPI SYCL dpnp dpctl numba-dpex Ulysses",
    description="Ulysses sequence-parallel attention for dpnp, dpctl and NumPy arrays over MPI, on SYCL devices",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[
        "ulysses_dp",
        "ulysses_dp._call",
        "ulysses_dp._device",
        "ulysses_dp._plan",
        "ulysses_dp._ranks",
        "ulysses_dp.backends",
        "ulysses_dp.kernels",
    ],
    # a top-level module named `kernels` would clash with another distribution
    package_dir={"ulysses_dp.kernels": "kernels"},
    package_data={"ulysses_dp": ["py.typed"], "ulysses_dp.kernels": ["spirv/*"]},
    install_requires=["dpctl>=0.21", "dpnp>=0.19", "mpi4py>=4", "numpy"],
    extras_require={
        "mpi": ["impi-rt>=2021.16"],
        "onednn": ["onednn==2026.1.*", "dpctl>=0.22"],  # of one SYCL runtime
        "llm": ["gguf", "tokenizers", "tqdm"],  # the model's wheel comes without its requirements: scripts/language_model.py
        "demo": ["matplotlib", "scikit-image>=0.25", "tqdm"],
        "docs": [
            *("matplotlib", "myst-parser>=5", "numpydoc>=1.8", "pydata-sphinx-theme>=0.16", "scikit-image>=0.25", "sphinx>=8"),
            *("sphinx-copybutton", "sphinx-design", "sphinx-gallery>=0.19", "jax>=0.10", "torch>=2.5"),
        ],
        "test": [
            *("array-api-strict", "build", "hypothesis", "ml_dtypes", "numpydoc>=1.8", "pytest>=8", "pytest-xdist"),
            "safetensors",
            "setuptools>=77",  # setup.py is run
        ],
        "torch": ["torch>=2.5"],
        "jax": ["jax>=0.10"],
        "peers": ["torch==2.13.0", "yunchang==0.6.4"],
        "dev": ["import-linter", "mypy", "numpydoc>=1.8", "ruff"],
    },
    cmdclass={"build_spirv": BuildSpirv, "sdist": SdistWithSpirv},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Mathematics",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
