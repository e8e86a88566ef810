"""The scripts as a user runs them: in processes of their own, under mpiexec."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import dense_attention

pytestmark = pytest.mark.single

ROOT = Path(__file__).parents[1]
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


def test_readme_example(tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "example.py").write_text(example)
    assert "True" in mpiexec(2, "example.py", cwd=tmp_path)
