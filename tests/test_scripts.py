"""The scripts as a user runs them: in processes of their own, under mpiexec."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
    full = [MPIEXEC, "-n", ranks, sys.executable, *command]
    done = subprocess.run(list(map(str, full)), cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
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


def test_run_attention_in_steps_reads_safetensors(arrays, tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    for name, x in arrays.items():
        save_file({name: x}, tmp_path / f"{name}.safetensors")
    # a script of two lines lowers the bar from which a run goes in steps
    (tmp_path / "steps.py").write_text("import run_attention\nrun_attention.LONG_RUN = 1\nrun_attention.main()\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"))
    text = mpiexec(2, "steps.py", *arguments(".safetensors"), "--out", "out.npy", "--check", cwd=tmp_path)
    expected, _ = dense_attention(**arrays)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
    assert "step" in text


def test_run_attention_by_another_backend(arrays, tmp_path):
    pytest.importorskip("torch")
    script = ROOT / "scripts/run_attention.py"
    mpiexec(2, script, *arguments(), "--out", "out.npy", "--causal", "--attn-type", "torch", cwd=tmp_path)
    expected, _ = dense_attention(**arrays, causal=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)


def test_run_attention_says_what_is_wrong(arrays, tmp_path):
    script = ROOT / "scripts/run_attention.py"
    text = mpiexec(2, script, *arguments()[:-1], "missing.npy", "--out", "out.npy", cwd=tmp_path, code=1)
    assert "missing.npy" in text
    np.save(tmp_path / "v", arrays["v"].astype(np.float64))
    text = mpiexec(2, script, *arguments(), "--out", "out.npy", cwd=tmp_path, code=1)
    assert "one dtype" in text
    assert "Traceback" not in text


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
    rows = json.loads((tmp_path / "rows.json").read_text())
    jobs = ["scatter_heads", "gather_heads", "scatter q|k|v", "gather q|k|v"]
    assert [(row["bytes"], row["job"]) for row in rows] == [(size, job) for size in (1024, 1126400) for job in jobs]
    for row in rows:
        assert set(row["microseconds"]) == {"ours", "alltoall", "memcpy", "numpy"} | ({"yunchang"} if PEERS else set())
        assert min(row["microseconds"].values()) > 0
        assert min(row["times_as_fast_as"].values()) > 0
        shares = row["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["wire"] > 0
        packs = row["job"].startswith("scatter")
        assert (shares["pack"] > 0, shares["unpack"] > 0) == (packs, not packs)
        assert (shares["agree"] > 0) == row["job"].endswith("heads")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert ("pip install '.[peers]'" in text) == (not PEERS)


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
    rows = json.loads((tmp_path / "rows.json").read_text())
    cases = [(seq, causal, backward) for seq in (64, 96) for causal in (False, True) for backward in (False, True)]
    assert [(row["seq"], row["causal"], row["backward"]) for row in rows] == cases
    for row in rows:
        assert min(row["seconds"].values()) > 0
        assert row["ratio"] > 0
        assert row["turns"] >= 3
    assert (tmp_path / "rows.png").stat().st_size > 10_000


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
