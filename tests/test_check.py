"""What ``--check`` makes of its results, and of a process that does not answer."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from ulysses_dp import check
from ulysses_dp._device.queue import default_queue

pytestmark = pytest.mark.single


def answers_from(what, dtype, seconds=100):
    """What one process says of the checks from this one on."""
    names = [x.name for x in check.checks(default_queue().sycl_device)]
    first = names.index(f"{what} {dtype}")
    code = f"from ulysses_dp import check; print(*map(check.line, check._answers({first}, {names}, {seconds})), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.splitlines()


def test_goes_on_until_something_is_wrong():
    assert [line.split()[-1] for line in answers_from("merge", "float64")] == ["right"] * 3


def test_a_check_that_hangs_is_given_up():
    (line,) = answers_from("merge", "float32", seconds=1e-3)
    assert line.endswith("no answer in 0.001 s")


def test_a_process_that_crashes():
    assert check._ending(-signal.SIGSEGV) == "signal 11"


def test_every_dtype_and_direction_is_checked():
    names = {x.name for x in check.checks(default_queue().sycl_device)}
    assert {"forward float32 64", "gradient float32 64 options", "forward bfloat16 64", "merge float16"} <= names


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0])
def test_error(bad):
    assert check._error(np.array([1.0, bad]), np.array([1.0, 1.0])) == (1.0 if bad == 2 else np.inf)
    assert check._error(np.array([-np.inf, 3.0]), np.array([-np.inf, 3.0])) == 0


def test_ranks_are_joined():
    good, bad = check.Result("a", error=1.0, seconds=1.0), check.Result("a", verdict="WRONG", error=2.0, seconds=0.5)
    (line,) = check.joined([[good], [bad]])
    assert (line.verdict, line.error, line.seconds, line.right) == ("WRONG (ranks 1)", 2.0, 1.0, False)
