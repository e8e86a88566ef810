"""The tile of the kernels for matrix engines, as numba intrinsics: 16 queries in the lanes, keys in registers. Build time only.

The engine multiplies A (8 rows, 16 columns) by B (16 rows, 16 columns) and adds to C (8 rows, 16 columns) of float32: `dpas`.
Lane l holds column l of all three; of B, two rows of 16 bits lie in one number of 32. So with the queries as columns

    scores (keys, queries)      = K (keys, head_dim) · Qᵀ (head_dim, queries)
    output (head_dim, queries)  = Vᵀ (head_dim, keys) · weights (keys, queries)

each lane keeps all numbers of its query: maximum and sum need no exchange between lanes, options are the functions of
register_stages.py, and weights, two of which follow each other in a lane, are B as soon as they are rounded.

K and Vᵀ come by block loads of up to 32 x 32 numbers, Qᵀ by transposing ones; all give zeros outside of their array. Only GPUs
have these and the engine. The specialisation constant `hardware` says so: without it, functions in the module do the same on
any device, slowly. The constant `half` says whether numbers of 16 bits are float16; otherwise they are bfloat16.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

from llvmlite import ir
from numba.core import datamodel, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.types import UniTuple
from numba.extending import intrinsic
from numba_dpex.core.descriptor import dpex_kernel_target

from .intrinsics import bfloat16_of
from .register_tile import choose, constant_of
from .subgroup import WIDTH, Emitter

if TYPE_CHECKING:
    from typing import Any

_I16, _I32, _I64, _F16, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
ROWS = 8  # of A
_LOADED = 32  # columns of a block load
_A, _B, _C = ir.VectorType(_I16, 8), ir.VectorType(_I32, 8), ir.VectorType(_F32, 8)
_DPAS = {
    "float16": "_Z38intel_sub_group_f16_f16_matrix_mad_k16Dv8_sDv8_iDv8_f",
    "bfloat16": "_Z40intel_sub_group_bf16_bf16_matrix_mad_k16Dv8_sDv8_iDv8_f",
}
_READ = "__builtin_IB_subgroup_block_read_flat_"


class _Vector(types.Type):
    """Eight numbers that a kernel holds in each lane and gives to the engine as they are."""

    def __init__(self, name, value):
        self.value = value
        super().__init__(name=f"matrix_{name}")


class _VectorModel(PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.value)


for _manager in (datamodel.default_manager, dpex_kernel_target.target_context.data_model_manager):
    _manager.register(_Vector, _VectorModel)
_OF_B, _OF_C = _Vector("b", _B), _Vector("c", _C)


class _Surface(NamedTuple):
    """An array of two dimensions in memory, of 16 bits."""

    pointer: Any
    origin: Any  # of its first number, in elements
    columns: Any
    rows: Any
    stride: Any  # from row to row, in elements


class _Engine:
    """Emits what the hardware does, or for devices without it a call of a function that does the same."""

    def __init__(self, context, builder, constants):
        self.emitter, self.builder = Emitter(context, builder), builder
        self._constants = constants

    def is_set(self, name):
        return self.builder.icmp_signed("!=", constant_of(self.emitter, self._constants[name]), ir.Constant(_I32, 0))

    def by_format(self, of_float16, of_bfloat16):
        return choose(self.emitter, self.is_set("half"), of_float16, of_bfloat16)

    def by_hardware(self, built_in, written):
        return choose(self.emitter, self.is_set("hardware"), built_in, written)

    def dpas(self, a, b, c):
        def built_in(numbers):
            return [self.emitter.call(_DPAS[numbers], _C, [a, b, c], convergent=True)]

        def by_engine():
            return self.by_format(lambda: built_in("float16"), lambda: built_in("bfloat16"))

        def written():
            return [self._function("multiply", _C, [a, b, c], self._multiply)]

        return self.by_hardware(by_engine, written)[0]

    def read(self, surface, row, column, rows):
        """The blocks of A of `rows` rows and 32 columns, as lists of those below each other."""
        given = self._address(surface)
        blocks = [(c, r) for c in range(2) for r in range(0, rows, ROWS)]

        def by_message():
            symbol, shape = f"{_READ}u16_m{rows}k16v2", ir.VectorType(_I16, 2 * rows)
            value = self.emitter.call(symbol, shape, [*given, self._place(column, row)], convergent=True)

            def block(first):
                mask = ir.Constant(ir.VectorType(_I32, ROWS), list(range(first, first + ROWS)))
                return self.builder.shuffle_vector(value, ir.Constant(shape, ir.Undefined), mask)

            return [block(c * rows + r) for c, r in blocks]

        def written():
            def block(c, r):
                place = self._place(self._plus(column, WIDTH * c), self._plus(row, r))
                return self._function("read_rows", _A, [*given, place], self._read_rows)

            return [block(c, r) for c, r in blocks]

        found = self.by_hardware(by_message, written)
        return found[: rows // ROWS], found[rows // ROWS :]

    def read_transposed(self, surface, row, column):
        """B of 16 rows, which become columns, from column `column` on."""
        given = self._address(surface)
        place = self._place(self.builder.lshr(column, ir.Constant(_I32, 1)), row)

        def by_message():
            return [self.emitter.call(f"{_READ}transpose_u32_k8", _B, [*given, place], convergent=True)]

        def written():
            return [self._function("read_columns", _B, [*given, place], self._read_columns)]

        return self.by_hardware(by_message, written)[0]

    def scaled(self, c, factor):
        """C times a number, by a function of its own."""

        def scale(engine, c, factor):
            builder = engine.builder
            for i in range(ROWS):
                index = ir.Constant(_I32, i)
                c = builder.insert_element(c, builder.fmul(builder.extract_element(c, index), factor), index)
            return c

        return self._function("scale", _C, [c, factor], scale)

    def rounded(self, low, high):
        """Two numbers of float32 as two of 16 bits in one of 32."""
        builder = self.builder

        def pair(of):
            vector = ir.Constant(ir.VectorType(_F32, 2), ir.Undefined)
            for i, x in enumerate((low, high)):
                vector = builder.insert_element(vector, x, ir.Constant(_I32, i))
            return of(vector)

        def bfloat16(vector):
            symbol = "_Z27__spirv_ConvertFToBF16INTELDv2_f"
            return self.emitter.call(symbol, ir.VectorType(_I16, 2), [vector])

        def float16(vector):
            return builder.fptrunc(vector, ir.VectorType(_F16, 2))

        def written():
            return [join(builder, bfloat16_of(builder, low), bfloat16_of(builder, high))]

        def of_bfloat16():
            return self.by_hardware(lambda: [builder.bitcast(pair(bfloat16), _I32)], written)

        return self.by_format(lambda: [builder.bitcast(pair(float16), _I32)], of_bfloat16)[0]

    def widened(self, x):
        """A number of 16 bits as float32."""
        builder = self.builder
        return self.by_format(
            lambda: [builder.fpext(builder.bitcast(x, _F16), _F32)],
            lambda: [builder.bitcast(builder.shl(builder.zext(x, _I32), ir.Constant(_I32, 16)), _F32)],
        )[0]

    def narrowed(self, x):
        """A number of float32 as one of 16 bits."""
        builder = self.builder
        return self.by_format(lambda: [builder.bitcast(builder.fptrunc(x, _F16), _I16)], lambda: [bfloat16_of(builder, x)])[0]

    def _address(self, surface):
        """The base of a surface, and its sizes in bytes less one, as the messages take them."""
        builder, one = self.builder, ir.Constant(_I32, 1)
        base = builder.ptrtoint(builder.gep(surface.pointer, [surface.origin]), _I64)
        columns, rows, stride = (builder.trunc(x, _I32) for x in (surface.columns, surface.rows, surface.stride))
        return [base, *(builder.sub(x, one) for x in (builder.shl(columns, one), rows, builder.shl(stride, one)))]

    def _plus(self, x, number):
        return self.builder.add(x, ir.Constant(_I32, number)) if number else x

    def _place(self, column, row):
        place = ir.Constant(ir.VectorType(_I32, 2), ir.Undefined)
        place = self.builder.insert_element(place, column, ir.Constant(_I32, 0))
        return self.builder.insert_element(place, row, ir.Constant(_I32, 1))

    def _function(self, name, result, arguments, body):
        """Call a function of the module, which is there once: `body` gets an engine, and its arguments."""
        module, symbol = self.builder.module, f"matrix_{name}"
        function = module.globals.get(symbol)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [x.type for x in arguments]), symbol)
            function.calling_convention, function.linkage = "spir_func", "internal"
            for attribute in ("noinline", "convergent", "nounwind"):
                function.attributes.add(attribute)
            inside = ir.IRBuilder(function.append_basic_block())
            inside.ret(body(_Engine(self.emitter.context, inside, self._constants), *function.args))
        call = self.builder.call(function, arguments, cconv="spir_func")
        call.attributes.add("convergent")
        return call

    @staticmethod
    def _multiply(engine, a, b, c):
        builder, emitter = engine.builder, engine.emitter
        columns = []  # of B, row by row
        for k in range(WIDTH):
            bits = builder.lshr(builder.extract_element(b, ir.Constant(_I32, k // 2)), ir.Constant(_I32, 16 * (k % 2)))
            columns.append(engine.widened(builder.trunc(bits, _I16)))
        for m in range(ROWS):
            index = ir.Constant(_I32, m)
            number, total = engine.widened(builder.extract_element(a, index)), builder.extract_element(c, index)
            for k in range(WIDTH):
                total = emitter.mad(emitter.broadcast(number, k), columns[k], total)
            c = builder.insert_element(c, total, index)
        return c

    @staticmethod
    def _read_rows(engine, base, width, height, pitch, place):
        """Eight rows, of each the number of the lane."""
        builder = engine.builder
        column = builder.add(builder.extract_element(place, ir.Constant(_I32, 0)), engine.lane())
        row, found = builder.extract_element(place, ir.Constant(_I32, 1)), ir.Constant(_A, ir.Undefined)
        for i in range(ROWS):
            number = engine.number_at(base, width, height, pitch, column, engine._plus(row, i))
            found = builder.insert_element(found, number, ir.Constant(_I32, i))
        return found

    @staticmethod
    def _read_columns(engine, base, width, height, pitch, place):
        """Of the row of the lane eight pairs of numbers."""
        builder, found = engine.builder, ir.Constant(_B, ir.Undefined)
        column = builder.shl(builder.extract_element(place, ir.Constant(_I32, 0)), ir.Constant(_I32, 1))
        row = builder.add(builder.extract_element(place, ir.Constant(_I32, 1)), engine.lane())
        for i in range(ROWS):
            places = [(engine._plus(column, 2 * i + e), row) for e in range(2)]
            pair = join(builder, *(engine.number_at(base, width, height, pitch, *x) for x in places))
            found = builder.insert_element(found, pair, ir.Constant(_I32, i))
        return found

    def lane(self):
        return self.emitter.call("_Z22get_sub_group_local_idv", _I32, [])

    def number_at(self, base, width, height, pitch, column, row):
        """A number of a surface, 0 outside of it."""
        builder, one, zero = self.builder, ir.Constant(_I32, 1), ir.Constant(_I64, 0)
        inside = builder.and_(builder.icmp_signed("<", builder.shl(column, one), width), builder.icmp_signed("<=", row, height))
        stride = builder.sext(builder.ashr(builder.add(pitch, one), one), _I64)
        place = builder.add(builder.mul(builder.sext(row, _I64), stride), builder.sext(column, _I64))
        numbers = builder.inttoptr(base, ir.PointerType(_I16, addrspace=1))
        # the first number is there: no surface is empty
        number = builder.load(builder.gep(numbers, [builder.select(inside, place, zero)]), align=2)
        return builder.select(inside, number, ir.Constant(_I16, 0))


def join(builder, low, high):
    """Two numbers of 16 bits in one of 32."""
    return builder.or_(builder.zext(low, _I32), builder.shl(builder.zext(high, _I32), ir.Constant(_I32, 16)))


def matrix_operations(head_dim: int, width: int, keys: int, rows: int, constants: dict[str, int]) -> SimpleNamespace:
    """The operations on tiles of `head_dim` numbers of a query, `width` numbers of a result, and `keys` keys of a step.

    A block load reads `rows` rows. `constants` holds the numbers of the specialisation constants `hardware`, `half` and `wide`:
    whether results are float32.
    """
    real = types.float32
    scores, weights = UniTuple(real, keys), UniTuple(_OF_B, keys // WIDTH)
    across_lanes = UniTuple(real, keys // WIDTH)
    query, total_type = UniTuple(_OF_B, head_dim // WIDTH), UniTuple(_OF_C, width // ROWS)

    def engine_of(context, builder):
        return _Engine(context, builder, constants)

    def as_i32(builder, x):
        return builder.trunc(x, _I32)

    def elements(builder, vectors):
        return [builder.extract_element(x, ir.Constant(_I32, i)) for x in vectors for i in range(ROWS)]

    def splat(builder, x):
        vector, lanes = ir.Constant(_C, ir.Undefined), ir.Constant(ir.VectorType(_I32, ROWS), [0] * ROWS)
        return builder.shuffle_vector(builder.insert_element(vector, x, ir.Constant(_I32, 0)), vector, lanes)

    @intrinsic
    def fill(typing_context, value):
        """A tile of equal numbers."""

        def generate(context, builder, signature, arguments):
            return context.make_tuple(builder, total_type, [splat(builder, arguments[0])] * (width // ROWS))

        return total_type(real), generate

    @intrinsic
    def load_queries(typing_context, q, origin, stride, count, size, row):
        """Qᵀ of 16 rows from `row` on."""

        def generate(context, builder, signature, arguments):
            engine, (pointer, origin, stride, count, size, row) = engine_of(context, builder), arguments
            surface, row = _Surface(pointer, origin, size, count, stride), as_i32(builder, row)
            loaded = [engine.read_transposed(surface, row, ir.Constant(_I32, d)) for d in range(0, head_dim, WIDTH)]
            return context.make_tuple(builder, query, loaded)

        return query(q, *[types.int64] * 5), generate

    def emit_products(engine, queries, surface, first):
        """K · Qᵀ; `queries(d)` are those of numbers d to d + 15."""
        sums, zero = [ir.Constant(_C, [0.0] * ROWS)] * (keys // ROWS), ir.Constant(_I32, 0)
        first = as_i32(engine.builder, first)
        for d in range(0, head_dim, _LOADED):
            given = [queries(d + e) for e in range(0, _LOADED, WIDTH)]
            for r in range(0, keys, rows):
                blocks = engine.read(surface, engine._plus(first, r), engine._plus(zero, d), rows)
                for column, b in zip(blocks, given, strict=True):
                    for i, a in enumerate(column, r // ROWS):
                        sums[i] = engine.dpas(a, b, sums[i])
        return engine.emitter.pack(scores, elements(engine.builder, sums))

    @intrinsic
    def dot(typing_context, given, k, origin, stride, count, size, first):
        """Products of the queries with the next keys."""

        def generate(context, builder, signature, arguments):
            engine, (given, k, origin, stride, count, size, first) = engine_of(context, builder), arguments
            numbers = engine.emitter.unpack(given, head_dim // WIDTH)
            return emit_products(engine, lambda d: numbers[d // WIDTH], _Surface(k, origin, size, count, stride), first)

        return scores(query, k, *[types.int64] * 5), generate

    @intrinsic
    def dot_loaded(typing_context, q, q_origin, q_stride, q_count, row, k, origin, stride, count, size, first):
        """The same with the queries loaded as they are needed."""

        def generate(context, builder, signature, arguments):
            engine, (q, q_origin, q_stride, q_count, row, k, origin, stride, count, size, first) = (
                engine_of(context, builder),
                arguments,
            )
            of_q, row = _Surface(q, q_origin, size, q_count, q_stride), as_i32(builder, row)
            loaded = lambda d: engine.read_transposed(of_q, row, ir.Constant(_I32, d))  # noqa: E731
            return emit_products(engine, loaded, _Surface(k, origin, size, count, stride), first)

        return scores(q, *[types.int64] * 4, k, *[types.int64] * 5), generate

    @intrinsic
    def load_across(typing_context, x, origin, count, first):
        """One number for each column, a lane for a column; the last one again after it."""

        def generate(context, builder, signature, arguments):
            engine, (x, origin, count, first) = engine_of(context, builder), arguments
            lane, last = builder.zext(engine.lane(), _I64), builder.sub(count, ir.Constant(_I64, 1))
            numbers = []
            for t in range(0, keys, WIDTH):
                column = builder.add(builder.add(first, lane), ir.Constant(_I64, t))
                column = builder.select(builder.icmp_signed("<", column, last), column, last)
                numbers.append(builder.load(builder.gep(x, [builder.add(origin, column)]), align=4))
            return engine.emitter.pack(across_lanes, numbers)

        return across_lanes(x, types.int64, types.int64, types.int64), generate

    @intrinsic
    def highest(typing_context, score):
        """The highest score of a step."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            return emitter.tree(emitter.maximum, emitter.unpack(arguments[0], keys))

        return real(scores), generate

    def weighing(difference):
        """2 to the power of scores in another unit, as far as they are below a number of that unit."""

        @intrinsic
        def weigh(typing_context, score, shift, unit):
            def generate(context, builder, signature, arguments):
                emitter, (score, shift, unit) = Emitter(context, builder), arguments
                numbers = emitter.unpack(score, keys)
                return emitter.pack(scores, [emitter.exp2(difference(emitter, x, shift, unit)) for x in numbers])

            return scores(scores, real, real), generate

        return weigh

    def scaled_first(emitter, x, shift, unit):
        return emitter.mad(x, unit, emitter.builder.fneg(shift))

    def scaled_last(emitter, x, shift, unit):
        # the difference is exact where scores are large and near each other
        return emitter.builder.fmul(emitter.builder.fsub(x, shift), unit)

    @intrinsic
    def sum_of(typing_context, weights_of_step):
        """The sum of the weights of a step."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            return emitter.tree(builder.fadd, emitter.unpack(arguments[0], keys))

        return real(scores), generate

    @intrinsic
    def rounded(typing_context, weights_of_step):
        """Weights as the engine takes them."""

        def generate(context, builder, signature, arguments):
            engine = engine_of(context, builder)
            numbers, packed = engine.emitter.unpack(arguments[0], keys), []
            for first in range(0, keys, WIDTH):
                vector = ir.Constant(_B, ir.Undefined)
                for i in range(ROWS):
                    pair = engine.rounded(*numbers[first + 2 * i : first + 2 * i + 2])
                    vector = builder.insert_element(vector, pair, ir.Constant(_I32, i))
                packed.append(vector)
            return context.make_tuple(builder, weights, packed)

        return weights(scores), generate

    @intrinsic
    def rescale(typing_context, total, factor, needed):
        """The tile times a number, which is 1 unless it is needed."""

        def generate(context, builder, signature, arguments):
            engine, (total, factor, needed) = engine_of(context, builder), arguments
            given = engine.emitter.unpack(total, width // ROWS)

            def where_needed():
                scaled = lambda: [builder.fmul(x, splat(builder, factor)) for x in given]  # noqa: E731
                return choose(engine.emitter, needed, scaled, lambda: given)

            # Intel's compiler for CPUs ends with an error where a branch that depends on scores chooses between vectors
            found = engine.by_hardware(where_needed, lambda: [engine.scaled(x, factor) for x in given])
            return engine.emitter.pack(total_type, found)

        return total_type(total_type, real, types.boolean), generate

    @intrinsic
    def accumulate(typing_context, total, given, v, origin, stride, count, first):
        """Add Vᵀ times the weights; rows of Vᵀ have `stride` keys, and there are `count`."""

        def generate(context, builder, signature, arguments):
            engine, (total, given, v, origin, stride, count, first) = engine_of(context, builder), arguments
            sums, given = engine.emitter.unpack(total, width // ROWS), engine.emitter.unpack(given, keys // WIDTH)
            surface, first, zero = _Surface(v, origin, stride, count, stride), as_i32(builder, first), ir.Constant(_I32, 0)
            for t in range(0, keys, _LOADED):
                for d in range(0, width, rows):
                    blocks = engine.read(surface, engine._plus(zero, d), engine._plus(first, t), rows)
                    for column, b in zip(blocks, given[t // WIDTH :], strict=False):
                        for i, a in enumerate(column, d // ROWS):
                            sums[i] = engine.dpas(a, b, sums[i])
            return engine.emitter.pack(total_type, sums)

        return total_type(total_type, weights, v, *[types.int64] * 4), generate

    def write(engine, out, place, number):
        """Write one number of a result, in float32 or rounded."""
        builder = engine.builder
        with builder.if_else(engine.is_set("wide")) as (as_float32, as_half):
            with as_float32:
                wide = builder.bitcast(out, ir.PointerType(_F32, addrspace=1))
                builder.store(number, builder.gep(wide, [place]), align=4)
            with as_half:
                builder.store(engine.narrowed(number), builder.gep(out, [place]), align=2)

    @intrinsic
    def store(typing_context, out, offset, size, total, factor):
        """Write the row of each lane."""

        def generate(context, builder, signature, arguments):
            engine, (out, offset, size, total, factor) = engine_of(context, builder), arguments
            for d, number in enumerate(elements(builder, engine.emitter.unpack(total, width // ROWS))):
                with builder.if_then(builder.icmp_signed("<", ir.Constant(_I64, d), size)):
                    write(engine, out, builder.add(offset, ir.Constant(_I64, d)), builder.fmul(number, factor))
            return context.get_dummy_value()

        return types.void(out, types.int64, types.int64, total_type, real), generate

    @intrinsic
    def add_infinite(typing_context, out, place, value):
        """Add a value to a number of a result if it is infinite or nan."""

        def generate(context, builder, signature, arguments):
            engine, (out, place, value) = engine_of(context, builder), arguments
            exponent = engine.by_format(lambda: [ir.Constant(_I16, 0x7C00)], lambda: [ir.Constant(_I16, 0x7F80)])[0]
            infinite = builder.icmp_unsigned("==", builder.and_(value, exponent), exponent)
            with builder.if_then(infinite):

                def wide():
                    address = builder.gep(builder.bitcast(out, ir.PointerType(_F32, addrspace=1)), [place])
                    return [builder.load(address, align=4)]

                def half():
                    return [engine.widened(builder.load(builder.gep(out, [place]), align=2))]

                (number,) = choose(engine.emitter, engine.is_set("wide"), wide, half)
                write(engine, out, place, builder.fadd(number, engine.widened(value)))
            return context.get_dummy_value()

        return types.void(out, types.int64, types.uint16), generate

    return SimpleNamespace(
        fill=fill, load_queries=load_queries, dot=dot, dot_loaded=dot_loaded, highest=highest, sum_of=sum_of, rounded=rounded,
        weigh_products=weighing(scaled_first), weigh_scores=weighing(scaled_last), rescale=rescale, accumulate=accumulate,
        load_across=load_across, store=store, add_infinite=add_infinite,
    )  # fmt: skip
