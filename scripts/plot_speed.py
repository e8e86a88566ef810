"""Draw the speeds that the benchmarks saved with --json, of one machine or of several, or print them as tables.

python scripts/plot_speed.py attention-zen4.json attention-zen5.json exchange-zen5.json --out speed.png
python scripts/plot_speed.py attention-zen4.json --table

`make speed` draws the picture of the README and writes the tables of the pages, of the files in docs/_static/speed.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from files import Output, on_all_ranks, picture_kind, refuse_clashes
from timing import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Row = dict[str, Any]


DATA = Path(__file__).parents[1] / "docs/_static/speed"


class Picture(NamedTuple):
    """What of the rows of a benchmark is drawn against what, in panels side by side, or put into tables."""

    title: str
    x: str  # a key of the case
    panel: Callable[[Row], str]  # to which a row belongs; "" if to none
    lines: Callable[[Row], dict[str, float]]  # by its label, the value of a row on every line
    reference: float | None = None  # a value to compare with
    logarithmic: bool = False


def attention_panel(row: Row) -> str:
    """Options are one panel; of the rest, what has one batch, as many kv heads as heads, and arrays as users have them."""
    case = row["case"]
    if case["option"]:
        return "options"
    if (case["batch"], case["kv_heads"], case["layout"]) != (1, case["heads"], "bshd"):
        return ""
    return ("gradient" if case["backward"] else "forward") + (", causal" if case["causal"] else "")


def attention_line(row: Row) -> str:
    """By head_dim, or by option."""
    case = row["case"]
    return case["option"] + (", causal" if case["causal"] else "") if case["option"] else f"head_dim {case['head_dim']}"


def scaling_line(row: Row) -> str:
    """By rows: of all ranks together, or of every rank."""
    return f"{row['case']['seq']} rows" + (" of a rank" if row["case"]["scaling"] == "weak" else "")


def mesh_lines(row: Row) -> dict[str, float]:
    """By the mesh, and by what it is compared with, but for itself."""
    ring, order = row["case"]["ring"], row["case"]["order"]
    itself = ("pure Ulysses",) if ring == 1 else ()
    return {f"ring {ring}, {order}; {name}": x for name, x in row["times_as_fast_as"].items() if name not in itself}


PICTURES = {
    "bench_attention": [
        Picture(
            "times as fast as PyTorch SDPA",
            "seq",
            attention_panel,
            lambda row: {attention_line(row): row["times_as_fast_as"]["pytorch"]},
            1.0,
        ),
        Picture(
            "share of the speed of sgemm",
            "seq",
            attention_panel,
            lambda row: {attention_line(row): row["of_sgemm"]} if "of_sgemm" in row else {},
        ),
    ],
    "bench_call": [
        Picture(
            "µs",
            "seq",
            lambda row: f"{row['case']['heads']} heads",
            lambda row: {name: 1e6 * seconds for name, seconds in row["least_seconds"].items()},
            logarithmic=True,
        )
    ],
    "bench_exchange": [
        Picture(
            "GB/s",
            "bytes",
            lambda row: row["case"]["job"],
            lambda row: {name: row["case"]["bytes"] / seconds / 1e9 for name, seconds in row["seconds"].items()},
            logarithmic=True,
        ),
        Picture("share of the time", "bytes", lambda row: row["case"]["job"], lambda row: row["shares"]),
    ],
    "bench_ulysses": [
        Picture(
            "times as fast as yunchang with PyTorch SDPA",
            "seq",
            lambda row: "forward and backward" if row["case"]["backward"] else "forward",
            lambda row: {"causal" if row["case"]["causal"] else "no mask": row["times_as_fast_as"]["yunchang"]},
            1.0,
        )
    ],
    "bench_ulysses --meshes": [
        Picture(
            "times as fast as another way",
            "seq",
            lambda row: f"{row['case']['ranks']} ranks" + (", causal" if row["case"]["causal"] else ""),
            mesh_lines,
            1.0,
        )
    ],
    "bench_ulysses --scaling": [
        Picture(
            "efficiency", "ranks", lambda row: row["case"]["scaling"], lambda row: {scaling_line(row): row["efficiency"]}, 1.0
        ),
        Picture(
            "share of the time",
            "ranks",
            lambda row: f"{scaling_line(row)}, {row['case']['scaling']}",
            lambda row: row["shares"],
        ),
    ],
}


class Panel(NamedTuple):
    """The lines of a panel: by machine and label, the values by x."""

    title: str
    lines: dict[tuple[str, str], dict[float, float]]


def panels(picture: Picture, results: list[dict[str, Any]]) -> list[Panel]:
    """What a picture shows of some results of one benchmark."""
    found: dict[str, Panel] = {}
    for content in results:
        for row in content["rows"]:
            title = picture.panel(row)
            for label, value in picture.lines(row).items() if title else ():
                lines = found.setdefault(title, Panel(title, {})).lines
                lines.setdefault((machine_name(content["machine"]), label), {})[row["case"][picture.x]] = value
    return list(found.values())


def machine_name(machine: dict[str, Any]) -> str:
    """What a legend calls a machine."""
    cores = machine["cores_of_every_rank"]
    of_ranks = f"{len(cores)} ranks on {cores[0]} of its cores each" if machine["mpi"] else f"{cores[0]} cores"
    return f"{machine['cpu']} ({machine['cpu_family']}), {of_ranks}"


def shown(results: list[dict[str, Any]], only: str = "") -> Iterator[tuple[Picture, list[Panel]]]:
    """The pictures of all benchmarks that there are results of, if these words are in their titles."""
    for benchmark, pictures in PICTURES.items():
        for picture in (x for x in pictures if only in x.title):
            filled = panels(picture, [content for content in results if content["benchmark"] == benchmark])
            if filled:
                yield picture, filled


def draw(results: list[dict[str, Any]], path: Path, kind: str, only: str = "") -> None:
    """Draw the results, a row of panels for each picture: a colour for each label, a style for each machine."""
    from matplotlib.figure import Figure

    pictures = list(shown(results, only))
    # as many rows of panels as columns, for narrow screens
    columns = [math.ceil(math.sqrt(len(filled))) for _, filled in pictures]
    rows = [math.ceil(len(filled) / count) for (_, filled), count in zip(pictures, columns, strict=True)]
    size = 1 + 3.7 * max(columns, default=1), 0.6 * len(rows) + 2.9 * max(sum(rows), 1)
    figure = Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(max(len(rows), 1), 1, squeeze=False, height_ratios=rows or None)[:, 0]
    for (picture, filled), part, shape in zip(pictures, parts, zip(rows, columns, strict=True), strict=False):
        machines = list(dict.fromkeys(machine for panel in filled for machine, _ in panel.lines))
        labels = list(dict.fromkeys(label for panel in filled for _, label in panel.lines))
        of_picture, explained = part.subplots(*shape, squeeze=False).flat, {}
        for axes, panel in zip(of_picture, filled, strict=False):
            for (machine, label), values in panel.lines.items():
                style = ("-", "--", ":", "-.")[machines.index(machine) % 4]
                name = label if len(machines) == 1 else f"{label}, {machine}"
                points = zip(*sorted(values.items()), strict=True)
                (explained[name],) = axes.plot(*points, f"{style}o", color=f"C{labels.index(label)}", ms=3)
            if picture.reference is not None:
                axes.axhline(picture.reference, color="grey", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set(xlabel=picture.x, title=panel.title)
            axes.set(yscale="log") if picture.logarithmic else axes.set(ylim=(0, None))
        part.supylabel(picture.title, fontsize="medium")
        for axes in of_picture[len(filled) :]:
            axes.axis("off")
        part.legend(explained.values(), explained, loc="outside lower center", ncols=len(machines), fontsize="small")
    figure.savefig(path, dpi=120, format=kind)


def tables(results: list[dict[str, Any]], only: str = "") -> Iterator[str]:
    """The same as tables in Markdown."""
    for picture, filled in shown(results, only):
        for panel in filled:
            for machine in dict.fromkeys(machine for machine, _ in panel.lines):
                lines = {label: values for (name, label), values in panel.lines.items() if name == machine}
                places = sorted({x for values in lines.values() for x in values})
                yield f"\n{picture.title}, {panel.title}, {machine}:\n"
                yield f"| {picture.x} | " + " | ".join(map(str, places)) + " |"
                yield "|---" * (1 + len(places)) + "|"
                for label, values in lines.items():
                    yield f"| {label} | " + " | ".join(f"{values[x]:.2f}" if x in values else "" for x in places) + " |"


def with_tables(page: str) -> str:
    """A page in which every table after a comment ``<!-- table: words of its title: files -->`` is made of these files."""

    def table(found: re.Match[str]) -> str:
        results = [load(str(DATA / name)) for name in found["files"].split()]
        return found["start"] + "\n".join(tables(results, found["title"])) + "\n\n<!-- end of the table -->"

    pattern = r"(?P<start><!-- table: (?P<title>[^:]*): (?P<files>[^>]*) -->\n).*?<!-- end of the table -->"
    return re.sub(pattern, table, page, flags=re.DOTALL)


def main() -> None:
    """Read, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="that benchmarks saved with --json")
    parser.add_argument("--out", metavar="FILE", help="draw here")
    parser.add_argument("--table", action="store_true", help="print tables in Markdown")
    parser.add_argument("--only", default="", metavar="WORDS", help="only pictures with these words in their title")
    parser.add_argument("--pages", nargs="+", default=[], metavar="PAGE", help="write the tables of these pages anew")
    arguments = parser.parse_args()

    def work() -> None:
        for page in map(Path, arguments.pages):
            page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
        refuse_clashes(dict(enumerate(arguments.files)), {"--out": arguments.out})
        results = [load(path) for path in arguments.files]
        if arguments.table:
            print(*tables(results, arguments.only), sep="\n")
        if arguments.out:
            with Output(arguments.out) as out:
                draw(results, out.part, picture_kind(arguments.out), arguments.only)
                out.complete()

    on_all_ranks(None, work)


if __name__ == "__main__":
    main()
