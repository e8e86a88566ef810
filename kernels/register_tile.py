"""The tile of the GPU forward kernel, as numba intrinsics: one query in each of 16 lanes, keys in registers. Build time only.

A tile is a tuple of floats that lives in registers: element i is one register of the sub-group, one number in each lane. The
operations emit unrolled code, because a loop over a private array would become memory traffic. Rows of K and V are the same
for all lanes: one register holds 16 consecutive numbers of a row, and a broadcast of a constant lane, which the compiler folds
into the multiply-add, hands one of them to every lane.

Such registers come from memory in one of two ways, a specialisation constant says which:

    two_dimensional     block loads, up to 16 rows in one message; the hardware gives zeros outside of the array. Only GPUs have
                        them, for arrays whose rows start at multiples of 64 bytes.
    else                one load per row, a number for each lane; lanes beyond the head_dim get zeros.

Constants are numbers until the driver compiles the kernel: what they leave out costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.types import UniTuple
from numba.core.typing import signature
from numba.extending import intrinsic

from .subgroup import WIDTH, Emitter

if TYPE_CHECKING:
    from collections.abc import Callable

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOAT = types.float32
_ROWS = 16  # of one block load


def specialisation(number: int) -> Callable[[], int]:
    """A function for kernels: the specialisation constant of this number, 0 unless the launcher sets it."""

    @intrinsic
    def constant(typing_context):
        def generate(context, builder, signature, arguments):
            return _constant(Emitter(context, builder), number)

        return types.int32(), generate

    return constant


def _constant(emitter, number):
    return emitter.call("_Z20__spirv_SpecConstantii", _I32, [ir.Constant(_I32, number), ir.Constant(_I32, 0)])


def _choose(emitter, condition, yes, no):
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


class Rows(NamedTuple):
    """The rows of one head of K or V as the emitters take them."""

    pointer: Any
    origin: Any  # of the first row, in elements
    stride: Any
    count: Any
    width: Any  # head_dim


def _read(emitter, rows, d, first, count, two_dimensional):
    """`count` registers with numbers d to d + 15 of rows first, first + 1, …; nothing after the last row counts."""
    builder = emitter.builder

    def by_block():
        base = builder.ptrtoint(builder.gep(rows.pointer, [rows.origin]), _I64)
        one, four = ir.Constant(_I32, 1), ir.Constant(_I32, 4)
        width, height, pitch = (builder.trunc(x, _I32) for x in (rows.width, rows.count, rows.stride))
        sizes = [builder.sub(x, one) for x in (builder.mul(width, four), height, builder.mul(pitch, four))]
        corner = ir.Constant(ir.VectorType(_I32, 2), ir.Undefined)
        corner = builder.insert_element(corner, ir.Constant(_I32, d), ir.Constant(_I32, 0))
        corner = builder.insert_element(corner, builder.trunc(first, _I32), one)
        name = f"__builtin_IB_subgroup_block_read_flat_u32_m{count}k16v1"
        value = emitter.call(name, ir.VectorType(_I32, count), [base, *sizes, corner], convergent=True)
        return [builder.bitcast(builder.extract_element(value, ir.Constant(_I32, t)), _F32) for t in range(count)]

    def by_row():
        lane = builder.zext(emitter.call("_Z22get_sub_group_local_idv", _I32, []), _I64)
        column = builder.add(lane, ir.Constant(_I64, d))
        inside = builder.icmp_signed("<", column, rows.width)
        column = builder.select(inside, column, ir.Constant(_I64, 0))
        last = builder.sub(rows.count, ir.Constant(_I64, 1))
        numbers = []
        for t in range(count):
            row = builder.add(first, ir.Constant(_I64, t))
            row = builder.select(builder.icmp_signed("<", row, last), row, last)
            place = builder.add(builder.add(rows.origin, builder.mul(row, rows.stride)), column)
            number = builder.load(builder.gep(rows.pointer, [place]), align=4)
            numbers.append(builder.select(inside, number, ir.Constant(_F32, 0.0)))
        return numbers

    return _choose(emitter, two_dimensional, by_block, by_row)


def tile_operations(head_dim, width, keys, q_in_registers, constants):
    """The operations on tiles of `head_dim` numbers of a query, `width` numbers of the result, and `keys` keys of a step.

    `constants` holds the numbers of the specialisation constants `two_dimensional` and `exact`: whether arrays have as many
    numbers in a row as the tile.

    Returns
    -------
    fill, load_query, dot, lowest, softmax, mark, accumulate, accumulate_seen, store : numba intrinsics
    """
    query_type, total_type = UniTuple(_FLOAT, head_dim), UniTuple(_FLOAT, width)
    scores = UniTuple(_FLOAT, keys)
    step_type = UniTuple(_FLOAT, keys + 3)
    rows_at_once = min(_ROWS, keys)

    def is_set(emitter, name):
        return emitter.builder.icmp_signed("!=", _constant(emitter, constants[name]), ir.Constant(_I32, 0))

    def beyond_as_zero(emitter, numbers, first, size):
        """The numbers, but zeros from number `size` on, which only arrays that are not exact have."""
        builder, zero = emitter.builder, ir.Constant(_F32, 0.0)

        def cut():
            return [
                builder.select(builder.icmp_signed("<", ir.Constant(_I64, first + e), size), x, zero)
                for e, x in enumerate(numbers)
            ]

        return _choose(emitter, is_set(emitter, "exact"), lambda: numbers, cut)

    @intrinsic
    def fill(typing_context, value):
        """A tile of equal numbers. The number is an argument: constants would be moved out of registers."""

        def generate(context, builder, signature, arguments):
            return Emitter(context, builder).pack(total_type, [arguments[0]] * width)

        return total_type(_FLOAT), generate

    @intrinsic
    def load_query(typing_context, q, offset, size):
        """The query row of each lane: the only load in which lanes read different rows."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            q, offset, size = arguments
            last = builder.sub(size, ir.Constant(_I64, 1))
            numbers = []
            for d in range(head_dim):
                index = ir.Constant(_I64, d)
                place = builder.add(offset, builder.select(builder.icmp_signed("<", index, last), index, last))
                numbers.append(builder.load(builder.gep(q, [place]), align=4))
            return emitter.pack(query_type, beyond_as_zero(emitter, numbers, 0, size))

        return query_type(q, types.int64, types.int64), generate

    def emit_dot(emitter, query_part, rows, first):
        two_dimensional = is_set(emitter, "two_dimensional")
        sums = [ir.Constant(_F32, 0.0)] * keys
        for d in range(0, head_dim, WIDTH):
            query = query_part(d)
            for r in range(0, keys, rows_at_once):
                start = emitter.builder.add(first, ir.Constant(_I64, r))
                for t, row in enumerate(_read(emitter, rows, d, start, rows_at_once, two_dimensional)):
                    for e in range(WIDTH):
                        sums[r + t] = emitter.mad(query[e], emitter.broadcast(row, e), sums[r + t])
        return emitter.pack(scores, sums)

    if q_in_registers:

        @intrinsic
        def dot(typing_context, query, k, origin, stride, count, size, first):
            """Products of the query rows with the next keys."""

            def generate(context, builder, signature, arguments):
                emitter = Emitter(context, builder)
                numbers = emitter.unpack(arguments[0], head_dim)
                return emit_dot(emitter, lambda d: numbers[d : d + WIDTH], Rows(*arguments[1:6]), arguments[6])

            return scores(query_type, k, *[types.int64] * 5), generate
    else:

        @intrinsic
        def dot(typing_context, q, q_offset, k, origin, stride, count, size, first):
            """The same with the query rows read from a panel (head_dim, 16 rows) as they are needed."""

            def generate(context, builder, signature, arguments):
                emitter = Emitter(context, builder)
                panel, start = arguments[:2]

                def query_part(d):
                    places = [builder.add(start, ir.Constant(_I64, (d + e) * WIDTH)) for e in range(0, WIDTH, 8)]
                    numbers = [x for place in places for x in emitter.block_read(panel, place, 8)]
                    return beyond_as_zero(emitter, numbers, d, arguments[6])

                return emit_dot(emitter, query_part, Rows(*arguments[2:7]), arguments[7])

            return scores(q, types.int64, k, *[types.int64] * 5), generate

    @intrinsic
    def lowest(typing_context, score):
        """The lowest score of a step."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            return emitter.tree(emitter.minimum, emitter.unpack(arguments[0], keys))

        return _FLOAT(scores), generate

    @intrinsic
    def softmax(typing_context, score, maximum, normaliser, minus_infinity, log2e):
        """One step of the online softmax: new maximum and normaliser, the factor for what was summed before, weights."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            score, maximum, normaliser, minus_infinity, log2e = arguments
            score = emitter.unpack(score, keys)
            highest = emitter.maximum(maximum, emitter.tree(emitter.maximum, score))
            # -inf - -inf would be nan for a row that has seen no key yet
            shift = builder.select(builder.fcmp_ordered(">", highest, minus_infinity), highest, ir.Constant(_F32, 0.0))

            def exp(x):
                # the difference first: it is exact where scores are large and near each other
                return emitter.exp2(builder.fmul(builder.fsub(x, shift), log2e))

            rescale, weights = exp(maximum), [exp(x) for x in score]
            normaliser = emitter.mad(normaliser, rescale, emitter.tree(builder.fadd, weights))
            return emitter.pack(step_type, [highest, normaliser, rescale, *weights])

        return step_type(scores, _FLOAT, _FLOAT, _FLOAT, _FLOAT), generate

    @intrinsic
    def mark(typing_context, step, score, minus_infinity):
        """Give keys that are hidden a weight of -1: one of 0 may come of underflow, and its value counts if it is nan."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            step, score = emitter.unpack(arguments[0], keys + 3), emitter.unpack(arguments[1], keys)
            hidden = [builder.fcmp_ordered("==", x, arguments[2]) for x in score]
            weights = [builder.select(h, ir.Constant(_F32, -1.0), w) for h, w in zip(hidden, step[3:], strict=True)]
            return emitter.pack(step_type, [*step[:3], *weights])

        return step_type(step_type, scores, _FLOAT), generate

    def accumulation(add):
        @intrinsic
        def accumulate(typing_context, total, step, v, origin, stride, count, size, first):
            """Rescale the sums and add the weighted values of a step."""

            def generate(context, builder, signature, arguments):
                emitter = Emitter(context, builder)
                two_dimensional = is_set(emitter, "two_dimensional")
                step, rows, first = emitter.unpack(arguments[1], keys + 3), Rows(*arguments[2:7]), arguments[7]
                total = [builder.fmul(x, step[2]) for x in emitter.unpack(arguments[0], width)]
                for d in range(0, width, WIDTH):
                    for r in range(0, keys, rows_at_once):
                        start = builder.add(first, ir.Constant(_I64, r))
                        for t, row in enumerate(_read(emitter, rows, d, start, rows_at_once, two_dimensional)):
                            for e in range(WIDTH):
                                total[d + e] = add(emitter, step[3 + r + t], emitter.broadcast(row, e), total[d + e])
                return emitter.pack(total_type, total)

            return total_type(total_type, step_type, v, *[types.int64] * 5), generate

        return accumulate

    def add_seen(emitter, weight, value, total):
        """0 · nan is nan: what is hidden must not reach the sum."""
        seen = emitter.builder.fcmp_unordered(">=", weight, ir.Constant(_F32, 0.0))
        return emitter.builder.select(seen, emitter.mad(weight, value, total), total)

    @intrinsic
    def store(typing_context, out, offset, size, total, factor):
        """Write the row of each lane."""

        def generate(context, builder, signature, arguments):
            out, offset, size, total, factor = arguments
            emitter = Emitter(context, builder)
            for d, number in enumerate(emitter.unpack(total, width)):
                with builder.if_then(builder.icmp_signed("<", ir.Constant(_I64, d), size)):
                    address = builder.gep(out, [builder.add(offset, ir.Constant(_I64, d))])
                    builder.store(builder.fmul(number, factor), address, align=4)
            return context.get_dummy_value()

        return types.void(out, types.int64, types.int64, total_type, _FLOAT), generate

    return fill, load_query, dot, lowest, softmax, mark, accumulation(Emitter.mad), accumulation(add_seen), store


def each_key(keys, stage, *argument_types, before=0):
    """A function for kernels that gives every score of a step to ``stage(score, t, *arguments)``, a function of numbers; t is
    the number of the key in the step. So many numbers come before the scores, and stay."""
    scores, rest_type = UniTuple(_FLOAT, before + keys), types.BaseTuple.from_types(argument_types)
    call = signature(_FLOAT, _FLOAT, types.int32, *argument_types)

    @intrinsic
    def apply(typing_context, score, arguments):
        def generate(context, builder, signature, values):
            emitter = Emitter(context, builder)
            given, rest = emitter.unpack(values[0], before + keys), emitter.unpack(values[1], len(argument_types))
            changed = [
                context.compile_internal(builder, stage, call, [x, ir.Constant(_I32, t), *rest])
                for t, x in enumerate(given[before:])
            ]
            return emitter.pack(scores, given[:before] + changed)

        return scores(scores, rest_type), generate

    return apply


def each_four_keys(keys, stage, *argument_types):
    """The same for the weights of a step, with ``stage(*weights, key, *arguments)`` for four keys at once."""
    step_type, rest_type = UniTuple(_FLOAT, keys + 3), types.BaseTuple.from_types(argument_types)
    four = UniTuple(_FLOAT, 4)
    call = signature(four, *[_FLOAT] * 4, types.int64, *argument_types)

    @intrinsic
    def apply(typing_context, step, first, arguments):
        def generate(context, builder, signature, values):
            emitter = Emitter(context, builder)
            numbers, rest = emitter.unpack(values[0], keys + 3), emitter.unpack(values[2], len(argument_types))
            for t in range(0, keys, 4):
                key = builder.add(values[1], ir.Constant(_I64, t))
                changed = context.compile_internal(builder, stage, call, [*numbers[3 + t : 7 + t], key, *rest])
                numbers[3 + t : 7 + t] = emitter.unpack(changed, 4)
            return emitter.pack(step_type, numbers)

        return step_type(step_type, types.int64, rest_type), generate

    return apply
