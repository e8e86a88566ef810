"""The scripts as a user runs them: in processes of their own, under mpiexec."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracle import dense_attention

from ulysses_dp import Machine
from ulysses_dp.machine import Level

pytestmark = pytest.mark.single

ROOT = Path(__file__).parents[1]
PEERS = all(importlib.util.find_spec(name) for name in ("torch", "yunchang"))
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def mpiexec(ranks: int, *command: object, cwd: Path | None = None, code: int = 0) -> str:
    """Run a Python script on some ranks and return what it printed."""
    return run(MPIEXEC, "-n", ranks, sys.executable, *command, cwd=cwd, code=code)


def run(*command: object, cwd: Path | None = None, code: int = 0) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, np.ndarray]:
    """q, k and v in files of the same names."""
    rng = np.random.default_rng(5)
    shapes = {"q": (2, 101, 4, 48), "k": (2, 67, 2, 48), "v": (2, 67, 2, 48)}
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, x in made.items():
        np.save(tmp_path / name, x)
    return made


def arguments(suffix: str = ".npy") -> list[str]:
    return [part for name in ("q", "k", "v") for part in (f"--{name}", f"{name}{suffix}")]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_run_attention(ranks, arrays, tmp_path):
    script = ROOT / "scripts/run_attention.py"
    options = ["--out", "out.npy", "--causal", "--check", 7, "--trace", "trace.json"]
    text = mpiexec(ranks, script, *arguments(), *options, cwd=tmp_path)
    expected, _ = dense_attention(**arrays, causal=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
    assert re.search(rf"^ranks +{ranks}$", text, re.MULTILINE)
    assert "in 7 rows" in text
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["name"] == "attention"} == set(range(ranks))
    assert "FAILED" not in text


def test_run_attention_in_steps_of_safetensors(arrays, tmp_path, monkeypatch):
    numpy_files = pytest.importorskip("safetensors.numpy")
    numpy_files.save_file({name: x.astype(ml_dtypes.bfloat16) for name, x in arrays.items()}, tmp_path / "all.safetensors")
    # a script of two lines lowers the bar from which a run goes in steps
    (tmp_path / "steps.py").write_text("import run_attention\nrun_attention.LONG_RUN = 1\nrun_attention.main()\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"))
    inputs = [part for name in "qkv" for part in (f"--{name}", "all.safetensors")]
    text = mpiexec(2, "steps.py", *inputs, "--out", "out.safetensors", "--check", cwd=tmp_path)
    expected, _ = dense_attention(**{name: x.astype(ml_dtypes.bfloat16).astype(float) for name, x in arrays.items()})
    out = numpy_files.load_file(tmp_path / "out.safetensors")["out"]
    np.testing.assert_allclose(out.astype(float), expected, atol=1e-2)
    assert "step" in text


def test_run_attention_checks_16_bits(arrays, tmp_path):
    for name, x in arrays.items():
        np.save(tmp_path / name, np.asfortranarray(x.astype(">f2")))
    mpiexec(2, ROOT / "scripts/run_attention.py", *arguments(), "--out", "out.npy", "--check", cwd=tmp_path)
    expected, _ = dense_attention(**{name: x.astype(np.float16).astype(float) for name, x in arrays.items()})
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=2e-3)


def test_run_attention_by_another_backend(arrays, tmp_path):
    pytest.importorskip("torch")
    script = ROOT / "scripts/run_attention.py"
    mpiexec(2, script, *arguments(), "--out", "out.npy", "--causal", "--attn-type", "torch", cwd=tmp_path)
    expected, _ = dense_attention(**arrays, causal=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)


def test_run_attention_fails_on_nan_that_the_reference_has_not(arrays, tmp_path):
    for name in "qk":
        np.save(tmp_path / name, arrays[name] * np.float32(1e19))  # whose products are beyond float32
    text = mpiexec(2, ROOT / "scripts/run_attention.py", *arguments(), "--out", "out.npy", "--check", cwd=tmp_path, code=1)
    assert re.search(r"largest error +inf .*FAILED", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "out.npy", "--q", "missing.npy"), "No such file or directory: 'missing.npy'"),
        (("--out", "link.npy"), "--out link.npy is the file of --v v.npy"),
        (("--out", "out.npy", "--trace", "out.npy"), "--trace out.npy is the file of --out out.npy"),
        (("--out", "out.npy", "--trace", "no/folder.json"), "No such file or directory: 'no/folder.json'"),
        (("--out", "out.npy", "--v", "float64.npy"), "one dtype"),
        (("--out", "out.npy", "--softmax-scale", "nan"), "softmax_scale"),
        (("--out", "full.npy"), "File too large: 'full.npy'"),
    ],
)
def test_run_attention_is_refused_and_harms_no_file(arrays, tmp_path, monkeypatch, options, message):
    np.save(tmp_path / "float64", arrays["v"].astype(float))
    (tmp_path / "link.npy").symlink_to("further.npy")
    (tmp_path / "further.npy").symlink_to("v.npy")
    (tmp_path / "out.npy").write_text("an earlier result")
    limit = "from resource import *\nsetrlimit(RLIMIT_FSIZE, (4096, 4096))\n" if "full.npy" in options else ""
    (tmp_path / "limited.py").write_text(f"from mpi4py import MPI\nimport run_attention\n{limit}run_attention.main()\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    text = mpiexec(2, "limited.py", *arguments(), *options, cwd=tmp_path, code=1)
    assert message in text
    assert "Traceback" not in text
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def array_files(monkeypatch):
    """The module of that name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("array_files")


def npy(x, version=(1, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, x, version)
    return file.getvalue()


def safetensors(dtype, shape, offsets, numbers=b"", name="q"):
    text = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return len(text).to_bytes(8, "little") + text + numbers


X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.txt", b"", "must end in .npy or .safetensors"),
        ("x.npy", b"", "EOF"),
        ("x.npy", b"PK\3\4", "EOF|magic"),
        ("x.npy", npy(X)[:-1], "greater than file size"),
        ("x.npy", npy(X)[:50], "EOF"),
        ("x.npy", npy(np.array([None, 1])), "Python objects"),
        ("x.npy", npy(X.astype(int)), "holds int64"),
        ("x.npy", npy(X.astype(complex)), "holds complex128"),
        ("x.npy", npy(X.astype(ml_dtypes.bfloat16)), "holds void16.*--dtype bfloat16"),
        ("x.npy", npy(X.astype(np.uint16)), "holds uint16.*--dtype bfloat16"),
        ("x.npy", npy(X.astype(ml_dtypes.float8_e4m3fn)), "holds void8"),
        ("x.npy", safetensors("F32", [2, 3], [0, 24], X.tobytes()), "magic"),
        ("x.safetensors", b"", "not a .safetensors file"),
        ("x.safetensors", b"\xff" * 100, "not a .safetensors file"),
        ("x.safetensors", npy(X), "not a .safetensors file"),
        ("x.safetensors", b"\2" + bytes(7) + b"12", "not a .safetensors file"),
        ("x.safetensors", b"\2" + bytes(7) + b"{}", "holds nothing"),
        ("x.safetensors", safetensors("F8_E4M3", [2, 3], [0, 6], bytes(6)), "holds F8_E4M3"),
        ("x.safetensors", safetensors("F32", [2, 3], [0, 24], bytes(23)), "not in the file"),
        ("x.safetensors", safetensors("F32", [2, 4], [0, 24], bytes(24)), "not an array of shape"),
        ("x.safetensors", safetensors("F32", [-2, -3], [0, 24], bytes(24)), "not an array of shape"),
        ("x.safetensors", safetensors("F32", "ab", [0, 24], bytes(24)), "TypeError"),
    ],
)
def test_broken_and_mislabelled_files_are_named(array_files, tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*{reason}"):
        array_files.open_array(str(path), "q")


@pytest.mark.parametrize("name", ["pipe.npy", "loop.npy", "folder.npy", "no/folder.npy"])
def test_what_is_no_file_is_not_opened(array_files, tmp_path, name):
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "loop.npy").symlink_to("loop.npy")
    (tmp_path / "folder.npy").mkdir()
    for action in (partial(array_files.open_array, name="q"), importlib.import_module("files").Output):
        with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
            action(str(tmp_path / name))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_files_are_written_as_they_are_read(array_files, tmp_path, suffix, dtype):
    start = array_files.header(suffix, "q", dtype, X.shape)
    numbers = X.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(start + numbers.tobytes())
    if suffix == ".npy":
        assert np.array_equal(np.load(path).view(numbers.dtype), numbers)
    else:
        read = pytest.importorskip("safetensors.numpy").load_file(path)["q"]
        assert read.dtype == numbers.dtype
        assert np.array_equal(read, numbers)
    array = array_files.open_array(str(path), "q", "bfloat16" if dtype == "bfloat16" else None)
    assert array.dtype == dtype
    assert np.array_equal(array.part_as_float64(slice(1, 2)), X[1:2])
    assert array.part(slice(1, 2)).tobytes() == numbers[1:2].tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("stored", [X, X.astype(">f4"), np.asfortranarray(X), X[:0]])
def test_npy_files_of_any_kind_are_read(array_files, tmp_path, version, stored):
    (tmp_path / "x.npy").write_bytes(npy(stored, version))
    part = array_files.open_array(str(tmp_path / "x.npy"), "q").part(slice(0, 2), slice(1, 3))
    assert part.dtype == np.float32
    assert part.dtype.isnative
    assert part.flags["C_CONTIGUOUS"]
    assert np.array_equal(part, stored[:2, 1:3])


@pytest.mark.parametrize("ranks", [1, 2])
def test_denoise_gains(ranks, tmp_path):
    text = mpiexec(ranks, ROOT / "scripts/denoise.py", "--size", 48, "--out", tmp_path / "out.png")
    noisy = float(re.search(r"PSNR noisy: ([\d.]+) dB", text)[1])
    denoised = [float(x) for x in re.findall(r"PSNR dB.* ([\d.]+)$", text, re.MULTILINE)]
    assert len(denoised) == 2
    assert min(denoised) > noisy + 4
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", ["example_functional.py", "example_ulysses_class_based.py"])
def test_examples(script):
    text = mpiexec(2, ROOT / "scripts" / script)
    assert text.count("(1, 512, 8, 64)") == 2


def test_bench_exchange(tmp_path):
    script, saved = ROOT / "scripts/bench_exchange.py", ("--json", tmp_path / "rows.json", "--plot", tmp_path / "rows.png")
    text = mpiexec(2, script, "--sizes", "1K", "1100K", "--seconds", 0.01, *saved)
    content = json.loads((tmp_path / "rows.json").read_text())
    assert len(content["machine"]["cores_of_every_rank"]) == 2
    jobs = ["scatter_heads", "gather_heads", "scatter q|k|v", "gather q|k|v"]
    cases = [{"job": job, "bytes": size, "ranks": 2, "copies": 1} for size in (1024, 1126400) for job in jobs]
    assert [row["case"] for row in content["rows"]] == cases
    for row in content["rows"]:
        assert set(row["seconds"]) == {"ours", "alltoall", "memcpy", "numpy"} | ({"yunchang"} if PEERS else set())
        assert min(row["seconds"].values()) > 0
        assert min(row["times_as_fast_as"].values()) > 0
        shares = row["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["wire"] > 0
        packs = row["case"]["job"].startswith("scatter")
        assert (shares["pack"] > 0, shares["unpack"] > 0) == (packs, not packs)
        assert (shares["agree"] > 0) == row["case"]["job"].endswith("heads")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert ("pip install '.[peers]'" in text) == (not PEERS)


@pytest.mark.parametrize("script", ["bench_exchange.py --json", "denoise.py --out"])
def test_a_script_that_could_not_write_its_result_does_not_start(tmp_path, script):
    name, option = script.split()
    text = mpiexec(2, ROOT / "scripts" / name, option, "no/rows.png", cwd=tmp_path, code=1)
    assert "No such file or directory: 'no/rows.png'" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plot": "rows.txt"}, "must end in"),
        ({"json": "rows.json", "plot": "./rows.json"}, "is the file of"),
        ({"json": "rows.txt", "against": "rows.txt"}, "is the file of"),
        ({"against": "rows.txt"}, "not a file that a benchmark saved"),
        ({"against": "other.json"}, "rows of bench_attention"),
    ],
)
def test_a_benchmark_refuses_files_before_it_measures(timing, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("[]")
    (tmp_path / "other.json").write_text(json.dumps(results_of("a", 1.0, 2.0)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=message):
        timing.Results("bench", argparse.Namespace(**{"json": None, "plot": None, "against": None} | options))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bench_exchange_refuses_wrong_numbers(tmp_path, monkeypatch):
    (tmp_path / "wrong.py").write_text(
        "import bench_exchange\nbench_exchange.textbook = lambda x, comm, scatter: x\nbench_exchange.main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"), prepend=":")
    text = mpiexec(2, "wrong.py", "--sizes", "1K", cwd=tmp_path, code=1)
    assert "numpy, scatter_heads, 1024 bytes: wrong numbers" in text


def test_bench_exchange_refuses_ranks_that_the_heads_do_not_fit():
    assert "2 or 4 ranks, not 3" in mpiexec(3, ROOT / "scripts/bench_exchange.py", code=1)


@pytest.mark.skipif(not PEERS, reason="needs torch and yunchang")
def test_bench_ulysses(tmp_path):
    saved = "--json", tmp_path / "rows.json", "--plot", tmp_path / "rows.png"
    mpiexec(2, ROOT / "scripts/bench_ulysses.py", "--seq", 64, 96, "--seconds", 0.01, *saved)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    cases = [(seq, causal, backward) for seq in (64, 96) for causal in (False, True) for backward in (False, True)]
    assert [(row["case"]["seq"], row["case"]["causal"], row["case"]["backward"]) for row in rows] == cases
    for row in rows:
        assert min(row["seconds"].values()) > 0
        assert row["times_as_fast_as"]["yunchang"] > 0
        assert row["turns"] >= 3
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_bench_ulysses_of_meshes(tmp_path):
    saved = "--json", tmp_path / "rows.json", "--plot", tmp_path / "rows.png"
    text = mpiexec(2, ROOT / "scripts/bench_ulysses.py", "--meshes", "--seq", 64, "--seconds", 0.01, *saved)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    cases = [
        (False, 1, "contiguous"),
        (False, 2, "contiguous"),
        (True, 1, "zigzag"),
        (True, 2, "zigzag"),
        (True, 2, "contiguous"),
    ]
    assert [(row["case"]["causal"], row["case"]["ring"], row["case"]["order"]) for row in rows] == cases
    for row in rows:
        assert row["times_as_fast_as"]["pure Ulysses"] > 0
        assert ("contiguous" in row["times_as_fast_as"]) == (row["case"]["order"] == "zigzag" and row["case"]["ring"] > 1)
        meshed_there = row["case"]["order"] == "zigzag" or not row["case"]["causal"]
        assert ("yunchang" in row["times_as_fast_as"]) == (bool(PEERS) and meshed_there)
    assert ("without a peer" in text) == (not PEERS)
    assert (tmp_path / "rows.png").stat().st_size > 5_000


@pytest.mark.skipif(not PEERS, reason="needs torch and yunchang")
def test_bench_attention(tmp_path):
    options = "--head-dim", 64, "--seq", 128, "--seconds", 0.01, "--backends", "--beside", sys.executable
    command = [sys.executable, ROOT / "scripts/bench_attention.py", *options, "--json", "rows.json", "--plot", "rows.png"]
    text = run(*command, cwd=tmp_path)
    assert "to the other checkout" in text
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"]["causal"] for row in content["rows"]] == [False, True]
    for row in content["rows"]:
        assert {"ours", "pytorch", "torch", "before", "sgemm"} <= set(row["seconds"])
        assert {"pytorch", "before"} <= set(row["times_as_fast_as"])
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    text = run(*command[:6], "--seconds", 0.01, "--against", "rows.json", cwd=tmp_path)
    assert "by the clock, beside pytorch" in text
    assert "geometric means of 2 rows" in text


def test_bench_call(tmp_path):
    options = "--seconds", 0.01, "--seq", 16, 32, "--json", "rows.json", "--plot", "rows.png"
    run(sys.executable, ROOT / "scripts/bench_call.py", *options, cwd=tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["case"]["heads"], row["case"]["seq"]) for row in rows] == [(1, 16), (8, 16), (8, 32)]
    for row in rows:
        least = row["least_seconds"]
        assert 0 < least["Python"] < least["ours"]
        assert 0 < least["kernel"] < least["ours"]
        assert sum(row["python"].values()) == pytest.approx(1)
        assert min(row["python"].values()) > 0


def test_bench_ulysses_scales(tmp_path):
    options = (
        "--scaling",
        "--seq",
        64,
        "--ranks",
        2,
        "--seconds",
        0.01,
        "--rounds",
        1,
        "--json",
        "rows.json",
        "--plot",
        "rows.svg",
    )
    text = run(sys.executable, ROOT / "scripts/bench_ulysses.py", *options, cwd=tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [tuple(row["case"].values()) for row in rows] == [
        (kind, 64, ranks) for kind in ("strong", "weak") for ranks in (1, 2)
    ]
    for row in rows:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert (row["shares"]["scatter"] > 0) == (row["case"]["ranks"] == 2)
        assert row["efficiency"] == 1 or row["case"]["ranks"] == 2
    assert len(re.findall(r"^(?:strong|weak) +64 +[12] \|.*%", text, re.MULTILINE)) == 4
    assert "<svg" in (tmp_path / "rows.svg").read_text()


@pytest.fixture
def timing(monkeypatch):
    """The module of that name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("timing")


def test_all_sides_take_turns(timing):
    order = []

    def turn(name, seconds):
        order.append(name)
        return seconds

    sides = {name: partial(turn, name, seconds) for name, seconds in (("ours", 2.0), ("theirs", 3.0), ("peak", 1.0))}
    times = timing.in_turns(sides, 0.0, rarely=("peak",))
    assert order == ["ours", "theirs", "peak"] + 3 * ["ours", "theirs"] + ["ours", "theirs", "peak"]
    assert timing.row({"seq": 1}, times)["times_as_fast_as"] == {"theirs": 1.5}
    calls = []
    assert timing.side(lambda: calls.append(time.sleep(0.01)), seconds=0.025)() == pytest.approx(0.01, abs=0.005)
    assert len(calls) == 1 + 3  # one to see how long it takes; a turn of one that does not count, and two


def results_of(machine, seconds, peer):
    """A file of a benchmark with two rows."""
    rows = []
    for seq, factor in ((128, 1.0), (256, 4.0)):
        case = {"head_dim": 64, "seq": seq, "causal": False, "batch": 1, "heads": 8, "kv_heads": 8}
        case |= {"layout": "bshd", "option": "", "backward": False}
        figures = {"seconds": {"ours": factor * seconds, "pytorch": factor * peer}, "of_sgemm": 0.5}
        rows.append({"case": case, **figures, "times_as_fast_as": {"pytorch": peer / seconds}})
    described = {"cpu": machine, "cpu_family": machine, "cores_of_every_rank": [2], "mpi": ""}
    return {"schema": 1, "benchmark": "bench_attention", "machine": described, "rows": rows}


def test_a_comparison_tells_a_slow_machine_from_a_slow_change(timing):
    slow_machine = list(timing.compare(results_of("a", 1.0, 2.0), results_of("a", 2.0, 4.0)))
    assert slow_machine[0] == "times as fast as before: by the clock, beside pytorch"
    assert slow_machine[1].split()[:2] == ["0.50", "1.00"]
    assert not any("SLOWER" in line for line in slow_machine)
    slow_change = list(timing.compare(results_of("a", 1.0, 2.0), results_of("a", 2.0, 2.0)))
    assert [line.split()[:2] for line in slow_change[1:]] == 3 * [["0.50", "0.50"]]
    assert slow_change[1].endswith("SLOWER")


def test_plot_speed_draws_several_machines(tmp_path):
    for name, seconds in (("a", 1.0), ("b", 4.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results_of(name, seconds, 2.0)))
    command = [sys.executable, ROOT / "scripts/plot_speed.py", "a.json", "b.json"]
    text = run(*command, "--table", "--out", "speed.svg", cwd=tmp_path)
    assert "times as fast as PyTorch SDPA, forward, a (a), 2 cores:\n\n| seq | 128 | 256 |" in text
    assert "| head_dim 64 | 2.00 | 2.00 |" in text
    assert "| head_dim 64 | 0.50 | 0.50 |" in text
    assert "head_dim 64, b (b)" in (tmp_path / "speed.svg").read_text()
    before = (tmp_path / "a.json").read_text()
    assert "is the file of" in run(*command, "--out", "a.json", cwd=tmp_path, code=1)
    assert (tmp_path / "a.json").read_text() == before


@pytest.mark.skipif(PEERS, reason="torch and yunchang are there")
def test_bench_ulysses_says_what_it_needs():
    assert "pip install '.[peers]'" in mpiexec(2, ROOT / "scripts/bench_ulysses.py", code=1)


def test_readme_example(tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "example.py").write_text(example)
    assert "True" in mpiexec(2, "example.py", cwd=tmp_path)


def test_plan_prints_saves_and_draws(tmp_path):
    script = ROOT / "scripts/plan.py"
    options = ("--seq", 65536, "--heads", 16, "--machine", "aurora", "--backward")
    text = mpiexec(1, script, *options, "--json", tmp_path / "plans.json", "--plot", tmp_path / "plan.png")
    plans = json.loads((tmp_path / "plans.json").read_text())
    assert [plan["ranks"] for plan in plans] == [2**n for n in range(15)]
    assert len(re.findall(r"^ *\d+ .*\|.*%", text, re.MULTILINE)) == 15
    assert "32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384: more ranks than heads" in text
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    few = mpiexec(1, script, *options, "--ranks", 3, 12)
    assert len(re.findall(r"^ *(3|12) .*\|.*%", few, re.MULTILINE)) == 2
    meshes = mpiexec(1, script, *options, "--ranks", 12, "--meshes", "--causal", "--order", "zigzag")
    assert re.findall(r"^ *12 +(\d+x\d+) .*\|.*%", meshes, re.MULTILINE) == ["12x1", "6x2", "4x3", "3x4", "2x6", "1x12"]
    assert "kv_heads" in mpiexec(1, script, *options, "--kv-heads", 3, code=1)


def test_plan_measures_a_machine_and_is_checked_on_it(tmp_path, monkeypatch):
    # a script of two lines makes the large calls short
    (tmp_path / "short.py").write_text("import plan\nplan.LARGE = 256\nplan.main()\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"), prepend=os.pathsep)
    text = mpiexec(2, "short.py", "--measure", "here.json", "--repeats", 2, cwd=tmp_path)
    machine = Machine.from_json((tmp_path / "here.json").read_text())
    assert machine.name == "here"
    assert machine.measured
    assert eval(text, {"Machine": Machine, "Level": Level}) == machine
    problem = ("--seq", 200, "--heads", 4, "--head-dim", 32, "--dtype", "bfloat16", "--backward", "--repeats", 2)
    for ranks in (1, 2):
        text = mpiexec(ranks, ROOT / "scripts/plan.py", "--check", "--machine", "here.json", *problem, cwd=tmp_path)
        errors = re.findall(r"^(\w[\w ]*?) +[\d.]+ [mµ]?s +[\d.]+ [mµ]?s +[+-]\d+%$", text, re.MULTILINE)
        assert errors.count("outside") == 2
        assert errors[-1] == "whole"
        assert len(errors) == (6 if ranks == 1 else 14)
    assert "at least two ranks" in mpiexec(1, ROOT / "scripts/plan.py", "--measure", "here.json", cwd=tmp_path, code=1)
