"""Calls of the kernels that a GPU gets, with random sizes, strides and options, compared with the NumPy references.

Inputs lie in memory between NaN, results between numbers that must stay. What a device gets is what `schedules.choose` says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from . import standin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .standin import Array, Machine

# Sizes that fill the tiles of the kernels, and others; each makes other specialisations, and not all can be translated.
HEAD_DIMS = {
    "float32": (7, 16, 32, 40, 64, 80, 96, 100, 128, 192, 256),
    "float64": (7, 16, 64, 100, 250),
    "float16": (40, 64, 127),
    "uint16": (7, 64, 80, 128, 160, 256),
}
# with all options at once; in float32 on the smallest tile also with each one alone
WITH_OPTIONS = {"float32": (7, 64, 100, 256), "float64": (7, 100), "float16": (64,), "uint16": (7, 128)}
OPTIONS = ("window", "softcap", "slopes", "sinks", "bias", "padding", "dropout")
GUARD = 7.0  # around results
# Largest error that passes, relative to the largest number of the result, or to 1 where that is larger. Numbers of 16 bits, of
# which uint16 are bfloat16, are those of arrays: the results of their kernels are float32 here, to see what the weights lose.
LIMITS = {"float32": 2e-5, "float64": 1e-6}
LIMITS_OF_HALVES = {"float16": 2e-3, "uint16": 1e-2}
# (dtype of the sources, dtype of the targets, whether there are sums)
COPIES = (
    *(("uint8", "uint8", False), ("uint16", "uint16", False), ("float32", "float32", False), ("float64", "float64", False)),
    *(("float32", "float32", True), ("float64", "float64", True)),
    *(("float16", "float32", False), ("float32", "float16", False), ("uint16", "float32", False), ("float32", "uint16", False)),
)
# (as what they travel, dtype of the numbers)
TRAVELS = (*product(("int8", "float8_e4m3"), ("float32", "float16", "uint16")),)


@dataclass(frozen=True)
class Case:
    """One call."""

    dtype: str
    head_dim: int
    options: tuple[str, ...] = ()
    backward: bool = False
    batch: int = 1
    kv_heads: int = 1
    group: int = 2
    head_shift: int = 0
    seq_q: int = 21
    seq_k: int = 35
    diagonal: int = 14
    dense: bool = False  # inputs are C-contiguous, each an allocation of its own, which 2-D block loads can read
    seed: int = 0

    @property
    def compute(self) -> str:
        """The dtype of sums and of lse."""
        return "float32" if self.dtype in LIMITS_OF_HALVES else self.dtype

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        heads = f"{self.kv_heads} kv heads of {self.group}" + (f" from {self.head_shift}" if self.head_shift else "")
        seen = " ".join(self.options) or f"diagonal {self.diagonal}"
        size = f"{self.batch} x {self.seq_q} x {self.seq_k}, {heads}"
        layout = "dense" if self.dense else "views"
        return f"{direction} {self.dtype} head_dim {self.head_dim}, {size}, {layout}, {seen}, seed {self.seed}"


class Dry:
    """A machine that only notes what it should run."""

    sycl_device = standin.Gpu()

    def __init__(self) -> None:
        self.wanted: set[tuple[str, tuple[tuple[int, int], ...]]] = set()

    def allocate(self, nbytes: int) -> Any:
        """Nothing."""
        return nbytes

    def write(self, handle: Any, numbers: np.ndarray) -> None:
        """Nothing."""

    def read(self, handle: Any, nbytes: int) -> bytes:
        """Zeros."""
        return bytes(nbytes)

    def run(self, name: str, arguments: list[Any], groups: int, lanes: int, constants: dict[int, int]) -> None:
        """Note the kernel, and how it is specialised."""
        self.wanted.add((name, tuple(sorted(constants.items()))))


def wanted(call: Callable[[Machine], Any]) -> set[tuple[str, tuple[tuple[int, int], ...]]]:
    """The kernels that a call launches."""
    dry = Dry()
    call(dry)
    return dry.wanted


# --- arrays -------------------------------------------------------------------------------------------------------------------


def inside(machine: Machine, x: np.ndarray, order: tuple[int, ...], fill: float = np.nan) -> tuple[Array, Array]:
    """x in memory, its axes in this order from the outermost one, as a view between `fill`; the view and the whole."""
    fill = 0xFFFF if x.dtype == np.uint16 else fill  # nan of bfloat16, too
    stored = np.pad(x.transpose(order), 1, constant_values=fill)
    whole = standin.asarray(machine, stored)
    view = whole[(slice(1, -1),) * x.ndim].permute(tuple(map(order.index, range(x.ndim))))
    return view, whole


def target(machine: Machine, shape: tuple[int, ...], order: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    """The same for a result: NaN until it is written."""
    return inside(machine, np.full(shape, np.nan, dtype), order, GUARD)


def surroundings_changed(whole: Array) -> bool:
    """Whether something was written around a view of `inside`."""
    host = standin.asnumpy(whole)
    host[(slice(1, -1),) * host.ndim] = GUARD
    return not (host == GUARD).all()


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest number; equal infinities and two NaN are no difference."""
    if got.size == 0:
        return 0.0
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0, np.abs(got.astype(np.float64) - expected))
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=1)
    return float(np.nan_to_num(difference, nan=np.inf).max() / scale)


# --- attention ----------------------------------------------------------------------------------------------------------------


def problem_of(case: Case, rng: np.random.Generator, heads: int) -> tuple[Any, dict[str, Any]]:
    """The problem of a case, its bias still a NumPy array, and the same as keyword arguments of the references."""
    from ulysses_dp.kernels.arguments import Problem
    from ulysses_dp.kernels.score import ScoreOptions

    options = None
    if case.options:
        i = np.arange(case.seq_q)
        first, end = np.zeros_like(i), np.full_like(i, case.seq_k)
        if "window" in case.options:
            first, end = np.clip(i - 9, 0, case.seq_k), np.clip(i + case.diagonal // 2, 0, case.seq_k)
        spans = np.stack([first, np.maximum(first, end), i + case.diagonal], axis=-1).astype(np.int64).reshape(case.seq_q, 3)
        shape = [int(rng.choice([1, n])) for n in (case.batch, heads, case.seq_q, case.seq_k)]
        bias = np.where(rng.random(shape) < 0.1, -np.inf, rng.standard_normal(shape)).astype(case.compute)
        given = {
            "softcap": ("softcap", 2.0),
            "slopes": ("slopes", rng.random((int(rng.choice([1, case.batch])), heads)) - 0.3),
            "sinks": ("sinks", rng.standard_normal(heads)),
            "bias": ("bias", np.broadcast_to(bias, (case.batch, heads, case.seq_q, case.seq_k))),
            "padding": ("padding", rng.random((int(rng.choice([1, case.batch])), case.seq_k)) < 0.8),
            "dropout": ("dropout_p", 0.25),
        }
        chosen = dict(given[name] for name in case.options if name in given)
        options = ScoreOptions(spans, seed=2**63 + 5 + case.seed, first_head=3, **chosen)
    numbers = {"scale": case.head_dim**-0.5, "diagonal": case.diagonal, "group": case.group, "head_shift": case.head_shift}
    return Problem(**numbers, options=options), {**numbers, "options": options}


def bias_on(machine: Machine, problem: Any) -> Any:
    """The problem with its bias in memory, broadcast by strides of 0 as it was."""
    if problem.options is None or problem.options.bias is None:
        return problem
    bias = problem.options.bias
    own = bias[tuple(slice(None) if stride else slice(0, 1) for stride in bias.strides)]
    strides = [s if n > 1 else 0 for s, n in zip(standin.asarray(machine, own).strides, own.shape, strict=True)]
    array = standin.Array(standin.asarray(machine, own).usm_data, own.dtype, bias.shape, strides)
    return replace(problem, options=replace(problem.options, bias=array))


def attention(machine: Machine, case: Case, *, compare: bool = True) -> list[np.ndarray]:
    """Run a case; raises where a result is wrong or something else was written. Returns the results."""
    from ulysses_dp.kernels import reference, schedules

    rng = np.random.default_rng(case.seed)
    heads = max(case.kv_heads * case.group - case.head_shift - int(rng.integers(0, case.group)), 1)
    problem, numbers = problem_of(case, rng, heads)
    of_q, of_k = (case.batch, case.seq_q, heads, case.head_dim), (case.batch, case.seq_k, case.kv_heads, case.head_dim)
    stored = [numbers_of(rng, shape, case.dtype) for shape in (of_q, of_k, of_k)]
    q, k, v = (widened(x) if case.dtype == "uint16" else x.astype(case.compute) for x in stored)
    order = (*map(int, rng.permutation(3)), 3)
    options = schedules.GPU_OPTIONS if case.options else ()
    schedule = schedules.choose(
        standin.Gpu(), np.dtype(case.dtype), case.head_dim, case.seq_q, options=options, backward=case.backward
    )
    problem = bias_on(machine, problem)

    def scratch(slot: str, shape: tuple[int, ...], dtype: Any = case.compute) -> Array:
        return standin.empty(machine, shape, dtype)

    def read_only(*arrays: np.ndarray) -> list[Array]:
        if case.dense:
            return [standin.asarray(machine, x) for x in arrays]
        return [inside(machine, x, (*map(int, rng.permutation(x.ndim)),) if x.ndim == 3 else order)[0] for x in arrays]

    if case.backward:
        expected_out, lse = reference.forward(q, k, v, **numbers)
        dout = rng.standard_normal(of_q).astype(case.dtype)
        lse, delta = (x.astype(case.dtype) for x in (lse, np.einsum("bihd,bihd->bhi", dout, expected_out)))
        names, shapes = ("dq", "dk", "dv"), (of_q, of_k, of_k)
        results, around = zip(*(target(machine, shape, order, case.dtype) for shape in shapes), strict=True)
        schedule.backward(tuple(read_only(dout, q, k, v)), *read_only(lse, delta), results, problem, scratch)
    else:
        names, shapes, orders = ("out", "lse"), (of_q, (case.batch, heads, case.seq_q)), (order, (2, 0, 1))
        results, around = zip(*(target(machine, s, o, case.compute) for s, o in zip(shapes, orders, strict=True)), strict=True)
        schedule.forward(*read_only(*stored), *results, problem, scratch)
    if not compare:
        return []
    got = [standin.asnumpy(x) for x in results]
    if case.backward:
        expected = reference.backward(dout, q, k, v, lse, delta, **numbers)
    else:
        expected = reference.forward(q, k, v, **numbers)
    for name, x, y, whole in zip(names, got, expected, around, strict=True):
        if surroundings_changed(whole):
            raise AssertionError(f"{case}: written outside of {name}")
        limit = LIMITS_OF_HALVES[case.dtype] if name == "out" and case.compute != case.dtype else LIMITS[case.compute]
        if not error(x, y) <= limit:
            raise AssertionError(f"{case}: error of {name} {error(x, y):.2e} > {limit}")
    return got


def kinds() -> Iterator[Case]:
    """A small case of every kind of call."""
    directions = *product(LIMITS, (False, True)), *product(LIMITS_OF_HALVES, (False,))
    for dtype, backward in directions:
        for head_dim, dense in product(HEAD_DIMS[dtype], (False, True)):
            yield Case(dtype, head_dim, backward=backward, dense=dense, seq_q=21, seq_k=35, diagonal=14)
        for head_dim in WITH_OPTIONS[dtype]:
            yield Case(dtype, head_dim, OPTIONS, backward=backward, seq_q=19, seq_k=37, diagonal=18)


def small(case: Case) -> Case:
    """The same kind of call for an interpreter: two tiles of rows, the second one not full, of one head."""
    return replace(case, group=1, seq_q=17 if not case.backward else 5, seq_k=19, diagonal=2)


def random_case(seed: int, rows: int) -> Case:
    """Any case up to so many rows."""
    rng = np.random.default_rng(seed)
    group, dtype = int(rng.integers(1, 5)), str(rng.choice(["float32", "float32", "float64", *LIMITS_OF_HALVES]))
    some, options = bool(rng.random() < 0.5), OPTIONS
    head_dim = int(rng.choice((WITH_OPTIONS if some else HEAD_DIMS)[dtype]))
    if (dtype, head_dim) == ("float32", min(HEAD_DIMS[dtype])):
        options = (str(rng.choice(OPTIONS)),)
    case = Case(
        dtype=dtype,
        head_dim=head_dim,
        options=options if some else (),
        backward=bool(rng.random() < 0.5) and dtype in LIMITS,
        batch=int(rng.integers(1, 4)),
        kv_heads=int(rng.integers(1, 4)),
        group=group,
        head_shift=int(rng.integers(0, group)),
        dense=bool(rng.random() < 0.5) and not some,
        seed=seed,
    )
    # The sizes last, so that a call up to fewer rows launches the same kernels. Short ones are the odd ones.
    seq_q, seq_k = (int(rng.integers(1, rng.choice([5, 20, 40, rows]) + 1)) - i for i in range(2))
    # all, causal, or a diagonal somewhere
    diagonal = int(rng.choice([seq_k, seq_k - seq_q, rng.integers(-seq_q, seq_k + 2)]))
    return replace(case, seq_q=seq_q, seq_k=seq_k, diagonal=diagonal)


# --- copies and dot products of rows ------------------------------------------------------------------------------------------


def widened(x: np.ndarray) -> np.ndarray:
    """The numbers of bfloat16, which lie in uint16."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    """Numbers rounded to bfloat16."""
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), bits >> 16 | 64, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def numbers(rng: np.random.Generator, size: int, dtype: str) -> np.ndarray:
    """Random numbers; of bytes all bits."""
    if dtype == "uint8":
        return np.frombuffer(rng.bytes(size), np.uint8).copy()
    if dtype == "uint16":
        return narrowed(rng.standard_normal(size).astype(np.float32))
    return (rng.standard_normal(size) * 100).astype(dtype)


def numbers_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Normally distributed numbers of a shape."""
    x = rng.standard_normal(shape)
    return narrowed(x.astype(np.float32)) if dtype == "uint16" else x.astype(dtype)


def copy(machine: Machine, kind: tuple[str, str, bool], seed: int, *, compare: bool = True) -> None:
    """One launch of random copies between strided blocks; raises unless every number is as it must be."""
    from ulysses_dp.kernels import relayout

    source_type, target_type, sums = kind
    rng = np.random.default_rng(seed)
    rows, batch = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    source_count, target_count = int(rng.integers(1, relayout.MAX_SOURCES + 1)), int(rng.integers(1, relayout.MAX_TARGETS + 1))
    ends, goals, panels = [1] * source_count, [3] * target_count, []
    for _ in range(int(rng.integers(1, 5))):
        extents = rows, batch, int(rng.integers(1, 4)), int(rng.choice([1, 3, 16, 19, 64, 130]))
        number, goal = int(rng.integers(source_count)), int(rng.integers(target_count))
        strides, span = nested(extents, (*map(int, rng.permutation(4)),), int(rng.integers(3)))
        to_strides, to_span = nested(extents, (*map(int, rng.permutation(3)), 3), int(rng.integers(3)))
        panel = relayout.Panel(number, ends[number], *strides, goal, goals[goal], *to_strides[:3], *extents[2:])
        ends[number] += span
        panels.append(panel)
        if sums:
            panels.append(panel._replace(source_offset=ends[number], add=1))
            ends[number] += span
        goals[goal] += to_span + 3
    sources = [numbers(rng, n, source_type) for n in ends]
    targets = [numbers(rng, n, target_type) for n in goals]
    given = [standin.asarray(machine, x) for x in sources]
    results = [standin.asarray(machine, x) for x in targets]
    relayout.copy_panels(given, results, panels, rows=rows, batch=batch)
    if not compare:
        return
    if (source_type, target_type) == ("uint16", "float32"):
        sources = list(map(widened, sources))
    if (source_type, target_type) == ("float32", "uint16"):
        sources = list(map(narrowed, sources))
    relayout.reference(sources, targets, panels, rows=rows, batch=batch)
    for number, (got, expected) in enumerate(zip(map(standin.asnumpy, results), targets, strict=True)):
        if got.tobytes() != expected.tobytes():
            raise AssertionError(f"copy {kind}, seed {seed}: target {number} differs")


def nested(extents: tuple[int, ...], order: tuple[int, ...], gap: int) -> tuple[list[int], int]:
    """Strides of axes that are nested in this order, and the elements that they span."""
    strides, stride = [0] * len(extents), 1
    for axis in reversed(order):
        strides[axis] = stride
        stride *= extents[axis] + gap
    return strides, stride


def travel(machine: Machine, kind: tuple[str, str], seed: int, *, compare: bool = True) -> None:
    """Random numbers to 8 bits and back; raises unless every byte of both is as it must be."""
    from ulysses_dp.kernels import relayout

    wire, dtype = kind
    rng = np.random.default_rng(seed)
    rows, slots, width, around = *map(int, rng.integers(1, 5, 2)), int(rng.choice([1, 5, 16, 50, 64])), 3
    x = rng.standard_normal((rows, slots, width)).astype(np.float32) * 10
    x[rng.random(x.shape) < 0.1] = rng.choice([np.nan, np.inf, -np.inf, 0])
    x = narrowed(x) if dtype == "uint16" else x.astype(dtype)
    codes = relayout.to_wire(widened(x) if dtype == "uint16" else x, wire)
    back = relayout.from_wire(codes, wire)
    expected = [codes, narrowed(back) if dtype == "uint16" else back.astype(dtype)]
    given = standin.asarray(machine, x.reshape(-1))
    results = [standin.asarray(machine, np.full(y.size + around, 7, y.dtype)) for y in expected]
    of_numbers, of_codes = ((slots * n, 0, n) for n in (width, codes.shape[2]))
    for source, target, at, to in ((given, results[0], of_numbers, of_codes), (*results, of_codes, of_numbers)):
        panel = relayout.Panel(0, 0, *at, 1, 0, 0, *to, slots, width)
        relayout.copy_panels([source], [target], [panel], rows=rows, batch=1, wire=wire)
    if not compare:
        return
    for got, of_all in zip(map(standin.asnumpy, results), expected, strict=True):
        inner = got[:-around].reshape(of_all.shape)
        if not np.array_equal(inner, of_all, equal_nan=dtype != "uint16") or not (got[-around:] == 7).all():
            raise AssertionError(f"travel {kind}, seed {seed}: {(inner != of_all).sum()} differ, or written outside")


def dot(machine: Machine, dtype: str, seed: int, *, compare: bool = True) -> None:
    """Dot products of random rows; raises where one is wrong."""
    from ulysses_dp.kernels import row_dot

    rng = np.random.default_rng(seed)
    shape = (*map(int, rng.integers(1, 6, 3)), int(rng.choice([1, 5, 64, 100])))
    x, y = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    y[0, 0, 0] = 0
    x[0, 0, 0] = np.nan
    order = (*map(int, rng.permutation(3)), 3)
    out, whole = target(machine, (shape[0], shape[2], shape[1]), (2, 0, 1), dtype)
    row_dot.dot_rows(inside(machine, x, order)[0], inside(machine, y, order)[0], out)
    if not compare:
        return
    found = error(standin.asnumpy(out), row_dot.reference(x, y))
    if not found <= LIMITS[dtype] or surroundings_changed(whole):
        raise AssertionError(f"row_dot {dtype}, seed {seed}: error {found:.2e}, or written outside")


def merge(machine: Machine, dtype: str, seed: int, *, compare: bool = True) -> None:
    """Join two random results; raises where one number is wrong."""
    from ulysses_dp.kernels import merge_rows

    rng = np.random.default_rng(seed)
    batch, seq, heads, head_dim = (*map(int, rng.integers(1, 6, 3)), int(rng.choice([1, 5, 64, 100])))
    out, part = (rng.standard_normal((batch, seq, heads, head_dim)).astype(dtype) for _ in range(2))
    lse, part_lse = rng.standard_normal((2, batch, heads, seq)).astype(dtype)
    for x, of_x in ((out, lse), (part, part_lse)):
        of_x[rng.random(of_x.shape) < 0.2] = -np.inf
        x[np.isneginf(of_x).swapaxes(1, 2)] = 0  # such a row has seen no key
    order = (*map(int, rng.permutation(3)), 3)
    into, whole = inside(machine, out, order, GUARD)
    merged, merged_whole = target(machine, lse.shape, (2, 0, 1), dtype)
    given = [inside(machine, x, o)[0] for x, o in ((lse, (1, 0, 2)), (part, order), (part_lse, (0, 2, 1)))]
    merge_rows.merge(into, *given, merged)
    if not compare:
        return
    for name, got, expected, around in zip(
        ("out", "lse"), (into, merged), merge_rows.reference(out, lse, part, part_lse), (whole, merged_whole), strict=True
    ):
        found = error(standin.asnumpy(got), expected)
        if not found <= LIMITS[dtype] or surroundings_changed(around):
            raise AssertionError(f"merge {dtype}, seed {seed}: error of {name} {found:.2e}, or written outside")
