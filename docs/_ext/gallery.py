"""A gallery for scripts that run under mpiexec: sphinx-gallery's format of scripts, run on two ranks unless they ask for more.

sphinx-gallery runs a script inside the process of Sphinx, which is one rank. Here its parser cuts the scripts into
prose and code, and each is run as its reader would: ``mpiexec -n 2 python examples/NAME.py``, in a folder of its own. A script
whose prose says ``mpiexec -n 4`` is run so.
The picture that it saves and what it prints end its page. A script runs again only if it, or the package, has changed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError
from sphinx_gallery.py_source_parser import split_code_and_text_blocks

ROOT = Path(__file__).resolve().parents[2]
RANKS, SECONDS = 2, 900
INTRODUCTION = """.. _gallery:

Gallery
=======

Each example is a short script that runs as it stands, ``mpiexec -n 2 python examples/NAME.py``, from a clone of the repository
after ``make demo``; some ask for more ranks. The pictures and the output on these pages are from such runs.

.. grid:: 1 1 2 3
   :gutter: 3

"""
CARD = """   .. grid-item-card:: {title}
      :img-top: {name}.png
      :link: {name}
      :link-type: doc

      {summary}

"""


def ranks_of(script: Path) -> int:
    """On how many ranks a script is run."""
    asked = re.search(r"mpiexec -n (\d+)", script.read_text(encoding="utf-8"))
    return int(asked[1]) if asked else RANKS


def run(script: Path, folder: Path) -> str:
    """Run a script on its ranks in `folder`, unless it ran there as it is now, and return what it printed."""
    sources = [script, *sorted((ROOT / "ulysses_dp").rglob("*.py")), ROOT / "kernels/spirv/manifest.json"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    log, stamp = folder / f"{script.stem}.txt", folder / f"{script.stem}.sha256"
    if not stamp.is_file() or stamp.read_text() != digest:
        command = ["mpiexec", "-n", str(ranks_of(script)), sys.executable, str(script)]
        mpiexec = Path(sys.executable).with_name("mpiexec")
        command[0] = str(mpiexec) if mpiexec.exists() else command[0]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            raise ExtensionError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        log.write_text(done.stdout, encoding="utf-8")
        stamp.write_text(digest)
    return log.read_text(encoding="utf-8")


def indent(text: str) -> str:
    return "\n".join(f"   {line}".rstrip() for line in text.strip("\n").splitlines())


def write_page(script: Path, output: str, target: Path) -> tuple[str, str]:
    """Write the page of a script; return its title and the first sentence."""
    _, blocks = split_code_and_text_blocks(str(script))
    (_, opening, _), *rest = blocks
    title, _, prose = opening.strip().partition("\n")
    prose = prose.partition("\n")[2].strip()  # behind the line under the title
    picture = f".. image:: {script.stem}.png\n   :alt: {title}\n"
    parts = [f"{title}\n{'=' * len(title)}", prose, picture]
    for kind, text, _ in rest:
        if text.strip():
            parts.append(text.strip() if kind == "text" else f".. code-block:: python\n\n{indent(text)}")
    parts.append(
        f"``mpiexec -n {ranks_of(script)} python examples/{script.name}`` printed::\n\n{indent(output)}"
        if output.strip()
        else ""
    )
    target.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return title, " ".join(prose.partition("\n\n")[0].split())


def build(app: Any) -> None:
    """Run the examples and write their pages before Sphinx looks for pages."""
    pages, results = Path(app.srcdir) / "gallery", Path(app.srcdir) / "_build" / "gallery"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    results.mkdir(parents=True, exist_ok=True)
    index, names = INTRODUCTION, []
    for script in sorted((ROOT / "examples").glob("*.py")):
        output = run(script, results)
        shutil.copy(results / f"{script.stem}.png", pages)
        title, summary = write_page(script, output, pages / f"{script.stem}.rst")
        index += CARD.format(title=title, name=script.stem, summary=summary)
        names.append(script.stem)
    toctree = ".. toctree::\n   :hidden:\n\n" + "".join(f"   {name}\n" for name in names)
    (pages / "index.rst").write_text(index + toctree, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", build)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
