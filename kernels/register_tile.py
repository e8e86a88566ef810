"""The tile of the GPU kernels, as numba intrinsics: one row in each of 16 lanes, columns in registers. Build time only.

Rows are queries and columns are keys, or in the kernels for dk and dv the other way round. A tile is a tuple of numbers that
lives in registers: element i is one register of the sub-group, one number in each lane. The operations emit unrolled code,
because a loop over a private array would become memory traffic. Columns are the same for all lanes: one register holds 16
consecutive numbers of a column, and a broadcast of a constant lane, which the compiler folds into the multiply-add, hands one
of them to every lane.

Such registers come from memory in one of three ways, specialisation constants say which:

    two_dimensional     block loads, up to 16 columns in one message; the hardware gives zeros outside of the array. Only GPUs
                        have them, for arrays of float32 whose columns start at multiples of 64 bytes.
    exact               one block load per column, where a column has as many numbers as the tile.
    else                one load per column, a number for each lane; lanes beyond the head_dim get zeros. Their addresses, too,
                        take registers.

Constants are numbers until the driver compiles the kernel: what they leave out costs nothing.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.types import UniTuple
from numba.core.typing import signature
from numba.extending import intrinsic

from .subgroup import WIDTH, Emitter

if TYPE_CHECKING:
    from collections.abc import Callable

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_AT_ONCE = 16  # columns of one block load
_IN_FLIGHT = 8  # columns whose addresses are in registers at the same time
_TANH = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925)  # tanh(x) / x by powers of x²
_NEAR = {4: 0.3, 8: 0.05}  # up to where, by the bytes of a number


def specialisation(number: int) -> Callable[[], int]:
    """A function for kernels: the specialisation constant of this number, 0 unless the launcher sets it."""

    @intrinsic
    def constant(typing_context):
        def generate(context, builder, signature, arguments):
            return constant_of(Emitter(context, builder), number)

        return types.int32(), generate

    return constant


def constant_of(emitter, number):
    """Emits the specialisation constant of this number."""
    return emitter.call("_Z20__spirv_SpecConstantii", _I32, [ir.Constant(_I32, number), ir.Constant(_I32, 0)])


@intrinsic
def exp2(typing_context, x):
    """2**x by the function of the hardware, where there is one."""

    def generate(context, builder, signature, arguments):
        return Emitter(context, builder, x).exp2(arguments[0])

    return x(x), generate


@intrinsic
def tanh(typing_context, x):
    """The hyperbolic tangent without a branch, to four units in the last place of float32 and 40 of float64: a call of the
    library takes 100 instructions."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(context, builder, x)
        (value,) = arguments
        far = _far_tanh(emitter, value)
        square = builder.fmul(value, value)
        near = emitter.number(_TANH[-1])
        for coefficient in _TANH[-2::-1]:
            near = emitter.mad(near, square, emitter.number(coefficient))
        is_near = builder.fcmp_ordered("<", square, emitter.number(_NEAR[emitter.size] ** 2))
        return builder.select(is_near, builder.fmul(near, value), far)

    return x(x), generate


@intrinsic
def quick_tanh(typing_context, x):
    """The hyperbolic tangent to 1e-7, which is much beside a small one: for scores that are rounded to 16 bits afterwards."""

    def generate(context, builder, signature, arguments):
        return _far_tanh(Emitter(context, builder, x), arguments[0])

    return x(x), generate


def _far_tanh(emitter, value):
    """1 - 2 / (exp(2 x) + 1): right for infinities and nan, but near 0 its error is large beside it."""
    builder, one = emitter.builder, emitter.number(1)
    power = emitter.exp2(builder.fmul(value, emitter.number(2 * math.log2(math.e))))
    return emitter.mad(builder.fdiv(one, builder.fadd(power, one)), emitter.number(-2), one)


def choose(emitter, condition, yes, no):
    """What `yes` or `no` emits, lists of as many numbers, by a condition."""
    builder = emitter.builder
    with builder.if_else(condition) as (then, otherwise):
        with then:
            first, first_end = yes(), builder.block
        with otherwise:
            second, second_end = no(), builder.block
    chosen = []
    for a, b in zip(first, second, strict=True):
        phi = builder.phi(a.type)
        phi.add_incoming(a, first_end)
        phi.add_incoming(b, second_end)
        chosen.append(phi)
    return chosen


class Columns(NamedTuple):
    """The columns of one head as the emitters take them: rows of K or V, or of q or dout, in memory."""

    pointer: Any
    origin: Any  # of the first column, in elements
    stride: Any
    count: Any
    width: Any  # head_dim


def _read_blocks(emitter, columns, d, first, count):
    """`count` registers with numbers d to d + 15 of columns first, first + 1, …; zeros after the last column."""
    builder = emitter.builder
    base = builder.ptrtoint(builder.gep(columns.pointer, [columns.origin]), _I64)
    one, four = ir.Constant(_I32, 1), ir.Constant(_I32, 4)
    width, height, pitch = (builder.trunc(x, _I32) for x in (columns.width, columns.count, columns.stride))
    sizes = [builder.sub(x, one) for x in (builder.mul(width, four), height, builder.mul(pitch, four))]
    corner = ir.Constant(ir.VectorType(_I32, 2), ir.Undefined)
    corner = builder.insert_element(corner, ir.Constant(_I32, d), ir.Constant(_I32, 0))
    corner = builder.insert_element(corner, builder.trunc(first, _I32), one)
    name = f"__builtin_IB_subgroup_block_read_flat_u32_m{count}k16v1"
    value = emitter.call(name, ir.VectorType(_I32, count), [base, *sizes, corner], convergent=True)
    return [builder.bitcast(builder.extract_element(value, ir.Constant(_I32, t)), emitter.real) for t in range(count)]


def _places(emitter, origin, stride, count, first, size):
    """Where `size` columns from `first` on begin, the last of all again after it. From one to the next it is an addition: a
    product of 64 bits takes nine instructions."""
    builder = emitter.builder
    last = builder.sub(count, ir.Constant(_I64, 1))
    start = builder.select(builder.icmp_signed("<", first, last), first, last)
    place = builder.add(origin, builder.mul(start, stride))
    for t in range(size):
        yield place
        more = builder.icmp_signed("<", builder.add(first, ir.Constant(_I64, t)), last)
        place = builder.add(place, builder.select(more, stride, ir.Constant(_I64, 0)))


def _read_rows(emitter, columns, d, first, count):
    """The same, a message for each column; the last column again after it. The rows must go on up to number d + 15."""
    builder = emitter.builder
    places = _places(emitter, columns.origin, columns.stride, columns.count, first, count)
    return [emitter.block_read(columns.pointer, builder.add(x, ir.Constant(_I64, d)), 1)[0] for x in places]


def _read_lanes(emitter, columns, d, first, count):
    """The same with zeros after the end of the rows, a number for each lane."""
    builder = emitter.builder
    lane = builder.zext(emitter.call("_Z22get_sub_group_local_idv", _I32, []), _I64)
    place_in = builder.add(lane, ir.Constant(_I64, d))
    inside = builder.icmp_signed("<", place_in, columns.width)
    place_in = builder.select(inside, place_in, ir.Constant(_I64, 0))
    numbers = []
    for place in _places(emitter, columns.origin, columns.stride, columns.count, first, count):
        number = builder.load(builder.gep(columns.pointer, [builder.add(place, place_in)]), align=emitter.size)
        numbers.append(builder.select(inside, number, emitter.number(0)))
    return numbers


def tile_operations(dtype: str, head_dim: int, width: int, columns: int, constants: dict[str, int]) -> SimpleNamespace:
    """The operations on tiles of `head_dim` numbers of a row, `width` numbers of a result, and `columns` columns of a step.

    `constants` holds the numbers of the specialisation constants `two_dimensional` and `exact`: whether arrays have as many
    numbers in a row as the tile.
    """
    real = getattr(types, dtype)
    row_type, total_type = UniTuple(real, head_dim), UniTuple(real, width)
    scores = UniTuple(real, columns)
    step_type = UniTuple(real, columns + 3)
    at_once = min(_AT_ONCE, columns)

    def emitter_of(context, builder):
        return Emitter(context, builder, real)

    def is_set(emitter, name):
        return emitter.builder.icmp_signed("!=", constant_of(emitter, constants[name]), ir.Constant(_I32, 0))

    def read(emitter, source, d, first):
        """Registers with numbers d to d + 15 of all columns of a step, `at_once` after another."""
        for r in range(0, columns, at_once):
            place = source, d, emitter.builder.add(first, ir.Constant(_I64, r)), at_once

            def in_one_dimension(place=place):
                return choose(
                    emitter, is_set(emitter, "exact"), lambda: _read_rows(emitter, *place), lambda: _read_lanes(emitter, *place)
                )

            if dtype == "float32":
                blocks = is_set(emitter, "two_dimensional")
                yield from choose(emitter, blocks, lambda p=place: _read_blocks(emitter, *p), in_one_dimension)
            else:
                yield from in_one_dimension()

    def beyond_as_zero(emitter, numbers, first, size):
        """The numbers, but zeros from number `size` on, which only arrays that are not exact have."""
        builder = emitter.builder

        def cut():
            return [
                builder.select(builder.icmp_signed("<", ir.Constant(_I64, first + e), size), x, emitter.number(0))
                for e, x in enumerate(numbers)
            ]

        return choose(emitter, is_set(emitter, "exact"), lambda: numbers, cut)

    @intrinsic
    def fill(typing_context, value):
        """A tile of equal numbers. The number is an argument: constants would be moved out of registers."""

        def generate(context, builder, signature, arguments):
            return emitter_of(context, builder).pack(total_type, [arguments[0]] * width)

        return total_type(real), generate

    @intrinsic
    def fill_scores(typing_context, value):
        """The same for the columns of a step."""

        def generate(context, builder, signature, arguments):
            return emitter_of(context, builder).pack(scores, [arguments[0]] * columns)

        return scores(real), generate

    @intrinsic
    def load_row(typing_context, x, offset, size):
        """The row of each lane: the only load in which lanes read different rows."""

        def generate(context, builder, signature, arguments):
            emitter = emitter_of(context, builder)
            x, offset, size = arguments
            last = builder.sub(size, ir.Constant(_I64, 1))
            numbers = []
            for d in range(head_dim):
                index = ir.Constant(_I64, d)
                place = builder.add(offset, builder.select(builder.icmp_signed("<", index, last), index, last))
                numbers.append(builder.load(builder.gep(x, [place]), align=emitter.size))
            return emitter.pack(row_type, beyond_as_zero(emitter, numbers, 0, size))

        return row_type(x, types.int64, types.int64), generate

    def emit_dot(emitter, row_part, source, first):
        sums = [emitter.number(0)] * columns
        for d in range(0, head_dim, WIDTH):
            row = row_part(d)
            for t, column in enumerate(read(emitter, source, d, first)):
                for e in range(WIDTH):
                    sums[t] = emitter.mad(row[e], emitter.broadcast(column, e), sums[t])
        return emitter.pack(scores, sums)

    @intrinsic
    def dot(typing_context, row, x, origin, stride, count, size, first):
        """Products of the rows with the next columns."""

        def generate(context, builder, signature, arguments):
            emitter = emitter_of(context, builder)
            numbers = emitter.unpack(arguments[0], head_dim)
            return emit_dot(emitter, lambda d: numbers[d : d + WIDTH], Columns(*arguments[1:6]), arguments[6])

        return scores(row_type, x, *[types.int64] * 5), generate

    @intrinsic
    def dot_panel(typing_context, rows, rows_offset, x, origin, stride, count, size, first):
        """The same with the rows read from a panel (head_dim, 16 rows) as they are needed."""

        def generate(context, builder, signature, arguments):
            emitter = emitter_of(context, builder)
            panel, start = arguments[:2]

            def row_part(d):
                places = [builder.add(start, ir.Constant(_I64, (d + e) * WIDTH)) for e in range(0, WIDTH, 8)]
                numbers = [x for place in places for x in emitter.block_read(panel, place, 8)]
                return beyond_as_zero(emitter, numbers, d, arguments[6])

            return emit_dot(emitter, row_part, Columns(*arguments[2:7]), arguments[7])

        return scores(rows, types.int64, x, *[types.int64] * 5), generate

    @intrinsic
    def lowest(typing_context, score):
        """The lowest score of a step."""

        def generate(context, builder, signature, arguments):
            emitter = emitter_of(context, builder)
            return emitter.tree(emitter.minimum, emitter.unpack(arguments[0], columns))

        return real(scores), generate

    @intrinsic
    def softmax(typing_context, score, maximum, normaliser, minus_infinity, log2e):
        """One step of the online softmax: new maximum and normaliser, the factor for what was summed before, weights."""

        def generate(context, builder, signature, arguments):
            emitter = emitter_of(context, builder)
            score, maximum, normaliser, minus_infinity, log2e = arguments
            score = emitter.unpack(score, columns)
            highest = emitter.maximum(maximum, emitter.tree(emitter.maximum, score))
            # -inf - -inf would be nan for a row that has seen no key yet
            shift = builder.select(builder.fcmp_ordered(">", highest, minus_infinity), highest, emitter.number(0))

            def exp(x):
                # the difference first: it is exact where scores are large and near each other
                return emitter.exp2(builder.fmul(builder.fsub(x, shift), log2e))

            rescale, weights = exp(maximum), [exp(x) for x in score]
            normaliser = emitter.mad(normaliser, rescale, emitter.tree(builder.fadd, weights))
            return emitter.pack(step_type, [highest, normaliser, rescale, *weights])

        return step_type(scores, real, real, real, real), generate

    @intrinsic
    def mark(typing_context, step, score, minus_infinity):
        """Give keys that are hidden a weight of -1: one of 0 may come of underflow, and its value counts if it is nan."""

        def generate(context, builder, signature, arguments):
            emitter = emitter_of(context, builder)
            step, score = emitter.unpack(arguments[0], columns + 3), emitter.unpack(arguments[1], columns)
            hidden = [builder.fcmp_ordered("==", x, arguments[2]) for x in score]
            weights = [builder.select(h, emitter.number(-1), w) for h, w in zip(hidden, step[3:], strict=True)]
            return emitter.pack(step_type, [*step[:3], *weights])

        return step_type(step_type, scores, real), generate

    def accumulation(sees):
        @intrinsic
        def accumulate(typing_context, total, step, x, origin, stride, count, size, first):
            """Add the columns times their weights; of what `softmax` returns, rescale the sums first."""
            rescales = step == step_type

            def generate(context, builder, signature, arguments):
                emitter = emitter_of(context, builder)
                source, first = Columns(*arguments[2:7]), arguments[7]
                total, weights = emitter.unpack(arguments[0], width), emitter.unpack(arguments[1], len(step))
                if rescales:
                    total = [builder.fmul(number, weights[2]) for number in total]
                    weights = weights[3:]
                for d in range(0, width, WIDTH):
                    for weight, column in zip(weights, read(emitter, source, d, first), strict=True):
                        for e in range(WIDTH):
                            added = emitter.mad(weight, emitter.broadcast(column, e), total[d + e])
                            total[d + e] = builder.select(sees(emitter, weight), added, total[d + e]) if sees else added
                return emitter.pack(total_type, total)

            return total_type(total_type, step, x, *[types.int64] * 5), generate

        return accumulate

    # 0 · nan is nan: what is hidden must not reach the sum. A weight that is nan is seen.
    def is_unmarked(emitter, weight):
        return emitter.builder.fcmp_unordered(">=", weight, emitter.number(0))

    def is_something(emitter, weight):
        return emitter.builder.fcmp_unordered("!=", weight, emitter.number(0))

    @intrinsic
    def store(typing_context, out, offset, size, total, factor):
        """Write the row of each lane."""

        def generate(context, builder, signature, arguments):
            out, offset, size, total, factor = arguments
            emitter = emitter_of(context, builder)
            for d, number in enumerate(emitter.unpack(total, width)):
                with builder.if_then(builder.icmp_signed("<", ir.Constant(_I64, d), size)):
                    address = builder.gep(out, [builder.add(offset, ir.Constant(_I64, d))])
                    builder.store(builder.fmul(number, factor), address, align=emitter.size)
            return context.get_dummy_value()

        return types.void(out, types.int64, types.int64, total_type, real), generate

    return SimpleNamespace(
        fill=fill, fill_scores=fill_scores, load_row=load_row, dot=dot, dot_panel=dot_panel, lowest=lowest,
        softmax=softmax, mark=mark, store=store, accumulate=accumulation(None),
        accumulate_unmarked=accumulation(is_unmarked), accumulate_nonzero=accumulation(is_something),
    )  # fmt: skip


def each_column(dtype: str, columns: int, stage: Callable[..., float], *argument_types: Any, across: int = 0):
    """A function for kernels that gives every score of a step to ``stage(score, t, *arguments)``, a function of numbers; t is
    the number of the column in the step.

    Of an argument that is a tuple of as many numbers, a stage gets that of the column; so it does of the first `across` ones,
    registers that hold the numbers of the columns lane by lane, a tuple of them for more columns than lanes. What the tuple of
    scores has more than these comes first, and stays.
    """
    real = getattr(types, dtype)
    scores, rest_type = UniTuple(real, columns), types.BaseTuple.from_types(argument_types)
    call = signature(real, real, types.int32, *(real if isinstance(x, UniTuple) else x for x in argument_types))

    @intrinsic
    def apply(typing_context, given, arguments):
        before = len(given) - columns

        def generate(context, builder, signature, values):
            emitter = Emitter(context, builder, real)
            numbers, rest = emitter.unpack(values[0], len(given)), emitter.unpack(values[1], len(argument_types))

            def argument(i, t):
                if argument_types[i] == scores:
                    return builder.extract_value(rest[i], t)
                if i >= across:
                    return rest[i]
                register = builder.extract_value(rest[i], t // WIDTH) if isinstance(argument_types[i], UniTuple) else rest[i]
                return emitter.broadcast(register, t % WIDTH)

            changed = [
                context.compile_internal(
                    builder, stage, call, [x, ir.Constant(_I32, t), *(argument(i, t) for i in range(len(rest)))]
                )
                for t, x in enumerate(numbers[before:])
            ]
            return emitter.pack(given, numbers[:before] + changed)

        return given(given, rest_type), generate

    return apply


def after(emitter, number, integer, still):
    """An integer that is only known when a number is: `still` is 0, but the compiler does not know. It would do many things at
    the same time otherwise, and spill."""
    builder = emitter.builder
    bits = builder.bitcast(number, ir.IntType(8 * emitter.size))
    bits = bits if emitter.size == 8 else builder.zext(bits, _I64)
    return builder.add(integer, builder.and_(bits, still))


def each_loaded_column(dtype: str, columns: int, stage: Callable[..., float], *, in_fours: bool):
    """A function for kernels that gives every score of a step to ``stage(score, t, number)`` with a number from memory: one for
    each row and column; `in_fours` where those of a row follow each other, and all columns are there.

    Addresses take two registers each, so the next numbers are only loaded `after` those before are used up.
    """
    real = getattr(types, dtype)
    scores, call, at_once = UniTuple(real, columns), signature(real, real, types.int32, real), min(_IN_FLIGHT, columns)

    def in_turn(emitter, x, origin, stride, count, first):
        places = _places(emitter, origin, stride, count, first, at_once)
        return [emitter.builder.load(emitter.builder.gep(x, [place]), align=emitter.size) for place in places]

    def four_by_four(emitter, x, origin, stride, count, first):
        builder, place, numbers = emitter.builder, emitter.builder.add(origin, first), []
        fours = builder.bitcast(builder.gep(x, [place]), ir.PointerType(ir.VectorType(emitter.real, 4), x.type.addrspace))
        for i in range(at_once // 4):
            four = builder.load(builder.gep(fours, [ir.Constant(_I64, i)]), align=emitter.size)
            numbers += [builder.extract_element(four, ir.Constant(_I32, e)) for e in range(4)]
        return numbers

    @intrinsic
    def apply(typing_context, given, x, origin, stride, count, first, still):
        """The last column again after it."""

        def generate(context, builder, signature, arguments):
            emitter, (given, x, origin, stride, count, first, still) = Emitter(context, builder, real), arguments
            numbers = emitter.unpack(given, columns)
            for t in range(0, columns, at_once):
                origin = after(emitter, numbers[t - 1], origin, still) if t else origin
                start = builder.add(first, ir.Constant(_I64, t))
                loaded = (four_by_four if in_fours else in_turn)(emitter, x, origin, stride, count, start)
                for i, number in enumerate(loaded, t):
                    numbers[i] = context.compile_internal(builder, stage, call, [numbers[i], ir.Constant(_I32, i), number])
            return emitter.pack(scores, numbers)

        return scores(scores, x, *[types.int64] * 5), generate

    return apply


def each_four_columns(dtype: str, columns: int, stage: Callable[..., tuple[float, ...]], *argument_types: Any):
    """The same with ``stage(*scores, first, *arguments)`` for four columns at once; `first` is the number of their first.

    For fewer registers, the next four are computed `after` those before.
    """
    real = getattr(types, dtype)
    four, rest_type = UniTuple(real, 4), types.BaseTuple.from_types(argument_types)
    call = signature(four, *[real] * 4, types.int64, *argument_types)

    @intrinsic
    def apply(typing_context, given, first, still, arguments):
        before = len(given) - columns

        def generate(context, builder, signature, values):
            emitter = Emitter(context, builder, real)
            numbers, rest = emitter.unpack(values[0], len(given)), emitter.unpack(values[3], len(argument_types))
            for t in range(before, len(given), 4):
                key = builder.add(values[1], ir.Constant(_I64, t - before))
                key = after(emitter, numbers[t - 1], key, values[2]) if t > before else key
                changed = context.compile_internal(builder, stage, call, [*numbers[t : t + 4], key, *rest])
                numbers[t : t + 4] = emitter.unpack(changed, 4)
            return emitter.pack(given, numbers)

        return given(given, types.int64, types.int64, rest_type), generate

    return apply
