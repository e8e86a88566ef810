"""The code on the pages runs when it is pasted, and the links of the pages lead somewhere."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ulysses_dp.kernels.schedules import KINDS

from ulysses_dp.doctor import ON_INTEL_GPUS, known_of

pytestmark = pytest.mark.single

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def blocks():
    """The Python of every page, but that under a heading which says that it was not run."""
    for page in PAGES:
        for section in re.split(r"^(?=#+ )", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if "not run" not in section.partition("\n")[0]:
                for number, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL)):
                    yield pytest.param(code, id=f"{page.name}-{section.partition(chr(10))[0].strip('# ')}-{number}")


@pytest.mark.pages
@pytest.mark.parametrize("code", list(blocks()))
def test_code_runs_when_pasted(code, tmp_path):
    (tmp_path / "pasted.py").write_text(code, encoding="utf-8")
    command = [MPIEXEC, "-n", "2", sys.executable, "pasted.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "False" not in done.stdout, "what the code says of itself is not true"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = re.sub(r"`[^`]*`|^    .*$", "", prose, flags=re.MULTILINE)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in link:
            made = re.fullmatch(r"gallery/(\w+)", link)  # by `make docs`, of an example
            assert (ROOT / f"examples/{made[1]}.py" if made else page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for name in re.findall(
        r"`((?:scripts|examples|packaging|tests|docs|kernels|ulysses_dp)/[\w/.-]+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name


def test_the_doctor_knows_what_ran_on_intel_gpus():
    table = (ROOT / "docs/gpu.md").read_text(encoding="utf-8").partition("Intel GPU |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert len(rows) > 3
    assert {family: when for family, *_, when in rows if when != "never"} == ON_INTEL_GPUS
    assert known_of(KINDS["cpu"]) == "run on CPUs by the tests of every change"
    assert known_of(KINDS["gpu"]).startswith("run on an Intel GPU: ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_data(page, monkeypatch):
    """`make speed` writes them."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    text = page.read_text(encoding="utf-8")
    assert importlib.import_module("plot_speed").with_tables(text) == text
