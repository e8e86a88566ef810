"""Calls from several threads at once, also when they are the first of the process."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from helpers import as_kind, new_queue, random_qkv

from ulysses_dp import attention, attention_backward, merge_attention

pytestmark = pytest.mark.single

THREADS = 6


def at_once(work):
    """Run this on every thread, at the same time; what the threads return."""
    barrier = Barrier(THREADS)

    def run(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(run, range(THREADS)))


def everything(q, k, v):
    """A call of every function of one rank, with options that need more than the kernels."""
    options = {"causal": True, "sinks": np.ones(q.shape[2], np.float32), "bias": np.ones((1, 1, 1, 1), np.float32)}
    out, lse = attention(q, k, v, return_lse=True, **options)
    return *attention_backward(out, q, k, v, out, lse, **options), *merge_attention(out, lse, out, lse)


@pytest.mark.parametrize(("function", "calls"), [(attention, 500), (everything, 20)])
def test_numpy_arrays(function, calls):
    whole = random_qkv(0, 1, 24, 2, 2, 16)
    expected = function(*whole)
    for results in at_once(lambda _: [function(*whole) for _ in range(calls)]):
        for result in results:
            for x, y in zip(result, expected, strict=True):
                np.testing.assert_array_equal(x, y)


def test_arrays_on_queues_of_the_user():
    whole = random_qkv(1, 1, 24, 2, 2, 16)
    expected = attention(*whole)
    arrays = [[as_kind(x, "dpnp", queue) for x in whole] for queue in [new_queue() for _ in range(THREADS)]]
    for results in at_once(lambda number: [attention(*arrays[number]) for _ in range(100)]):
        for result in results:
            np.testing.assert_array_equal(result.asnumpy(), expected)


@pytest.mark.parametrize("attempt", range(4))
def test_first_calls_of_a_process(attempt):
    code = """if True:
    import faulthandler, threading, numpy, test_threads
    faulthandler.dump_traceback_later(90, exit=True)
    x = numpy.ones((1, 24, 2, 16), "float32")
    results = test_threads.at_once(lambda _: test_threads.everything(x, x, x))
    print(len(results))
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=Path(__file__).parent)
    assert done.stdout == f"{THREADS}\n"
