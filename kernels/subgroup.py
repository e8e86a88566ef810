"""Sub-group operations, and register tiles for the GPU kernels of the gradient, as numba intrinsics. Build time only.

A tile is a tuple of floats that lives in registers: element i of the tuple is one register of the sub-group, one number in
each of its 16 lanes. The operations emit unrolled code, because a loop over a private array would become memory traffic.
Rows of K and V are the same for all lanes: a block read brings 16 consecutive numbers into the 16 lanes of one register, and
a broadcast of a constant lane, which the compiler folds into the multiply-add, hands one of them to every lane.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types import UniTuple
from numba.extending import intrinsic
from numba_dpex.kernel_api_impl.spirv.target import LLVM_SPIRV_ARGS

WIDTH = 16  # lanes of a sub-group

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_F32 = ir.FloatType()
_FLOAT = types.float32


class Emitter:
    """Emits LLVM for one intrinsic: calls of built-in functions, and reads of rows."""

    def __init__(self, context, builder):
        self.context = context
        self.builder = builder
        # block reads are an extension that the translator must be told to allow
        context.extra_compile_options[LLVM_SPIRV_ARGS] = ["--spirv-ext=+SPV_INTEL_subgroups"]

    def call(self, symbol, result, arguments, *, convergent=False):
        function_type = ir.FunctionType(result, [x.type for x in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, symbol)
        function.calling_convention = "spir_func"
        function.attributes.add("nounwind")
        # what lanes exchange must not be moved into a branch
        function.attributes.add("convergent" if convergent else "readnone")
        return self.builder.call(function, arguments, cconv="spir_func")

    def mad(self, a, b, c):
        return self.call("_Z3madfff", _F32, [a, b, c])

    def maximum(self, a, b):
        return self.call("_Z4fmaxff", _F32, [a, b])

    def minimum(self, a, b):
        return self.call("_Z4fminff", _F32, [a, b])

    def exp2(self, x):
        return self.call("_Z4exp2f", _F32, [x])

    def broadcast(self, register, lane):
        lane = ir.Constant(_I32, lane)
        return self.call("_Z19sub_group_broadcastfj", _F32, [register, lane], convergent=True)

    def block_read(self, pointer, index, count):
        """Registers with `count` * 16 consecutive numbers: number 16 i + e is lane e of register i."""
        builder = self.builder
        address_space = pointer.type.addrspace
        address = builder.bitcast(builder.gep(pointer, [index]), ir.PointerType(_I32, addrspace=address_space))
        name = "intel_sub_group_block_read" + (str(count) if count > 1 else "")
        symbol = f"_Z{len(name)}{name}PU3AS{address_space}Kj"
        result = ir.VectorType(_I32, count) if count > 1 else _I32
        value = self.call(symbol, result, [address], convergent=True)
        parts = [builder.extract_element(value, ir.Constant(_I32, i)) for i in range(count)] if count > 1 else [value]
        return [builder.bitcast(part, _F32) for part in parts]

    def row(self, pointer, index, size):
        """`size` consecutive numbers, each in all lanes, as a list; read 64 at a time."""
        numbers = []
        for first in range(0, size, 4 * WIDTH):
            count = min(4, (size - first) // WIDTH)
            place = self.builder.add(index, ir.Constant(_I64, first))
            for register in self.block_read(pointer, place, count):
                numbers += [self.broadcast(register, lane) for lane in range(WIDTH)]
        return numbers

    def rows(self, index, stride, count, available):
        """Where `count` rows start; from the last available one on, they repeat it instead of leaving the array."""
        places = [index]
        for t in range(1, count):
            step = self.builder.select(
                self.builder.icmp_signed("<", ir.Constant(_I64, t), available), stride, ir.Constant(_I64, 0)
            )
            places.append(self.builder.add(places[-1], step))
        return places

    def tree(self, operation, values):
        """Combine the values pairwise: a short chain of dependent instructions."""
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [operation(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return values[0]

    def unpack(self, tile, size):
        return [self.builder.extract_value(tile, i) for i in range(size)]

    def pack(self, tuple_type, values):
        return self.context.make_tuple(self.builder, tuple_type, values)


@intrinsic
def lane_index(typing_context):
    """Number of the lane in its sub-group."""

    def generate(context, builder, signature, arguments):
        return builder.zext(Emitter(context, builder).call("_Z22get_sub_group_local_idv", _I32, []), _I64)

    return types.int64(), generate


def _over_lanes(symbol):
    """The same number in all lanes, of an integer or a condition in each."""

    @intrinsic
    def reduce(typing_context, x):
        def generate(context, builder, signature, arguments):
            (value,) = arguments
            value = builder.zext(value, _I32) if value.type == ir.IntType(1) else builder.trunc(value, _I32)
            value = Emitter(context, builder).call(symbol, _I32, [value], convergent=True)
            if x == types.boolean:
                return builder.icmp_signed("!=", value, ir.Constant(_I32, 0))
            return builder.sext(value, _I64)

        return (types.boolean if x == types.boolean else types.int64)(x), generate

    return reduce


lowest_lane = _over_lanes("_Z20sub_group_reduce_mini")
highest_lane = _over_lanes("_Z20sub_group_reduce_maxi")
any_lane = _over_lanes("_Z13sub_group_anyi")


@intrinsic
def divide(typing_context, a, b):
    """Quotient of two numbers from 0 to 2**31. A 64-bit division is a loop on a GPU, after which the compiler no longer knows
    that all lanes have the same quotient, and every load that depends on it becomes one load per lane."""

    def generate(context, builder, signature, arguments):
        x, y = (builder.trunc(x, _I32) for x in arguments)
        return builder.zext(builder.udiv(x, y), _I64)

    return types.int64(types.int64, types.int64), generate


def tile_operations(head_dim, keys):
    """The operations on tiles of one head_dim, a multiple of 16, and `keys` columns of a step: ``fill, dot, store``."""
    vector = UniTuple(_FLOAT, head_dim)
    scores = UniTuple(_FLOAT, keys)

    @intrinsic
    def fill(typing_context, value):
        """A vector of equal numbers. The number is an argument: constants would be moved out of registers."""

        def generate(context, builder, signature, arguments):
            return Emitter(context, builder).pack(vector, [arguments[0]] * head_dim)

        return vector(_FLOAT), generate

    @intrinsic
    def dot(typing_context, rows, rows_offset, columns, offset, stride, available):
        """Products of rows, read from a panel (head_dim, 16 rows) as they are needed, with the next columns; of `available`
        columns, which may be fewer, the last is repeated."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            panel, start, columns, offset, stride, available = arguments
            sums = [ir.Constant(_F32, 0.0)] * keys
            places = emitter.rows(offset, stride, keys, available)
            for d in range(0, head_dim, WIDTH):
                parts = [builder.add(start, ir.Constant(_I64, (d + e) * WIDTH)) for e in range(0, WIDTH, 8)]
                row = [x for part in parts for x in emitter.block_read(panel, part, 8)]
                numbers = [emitter.row(columns, builder.add(place, ir.Constant(_I64, d)), WIDTH) for place in places]
                for e in range(WIDTH):
                    for t in range(keys):
                        sums[t] = emitter.mad(row[e], numbers[t][e], sums[t])
            return emitter.pack(scores, sums)

        return scores(rows, types.int64, columns, types.int64, types.int64, types.int64), generate

    @intrinsic
    def store(typing_context, out, offset, total, factor):
        """Write the row of each lane."""

        def generate(context, builder, signature, arguments):
            out, offset, total, factor = arguments
            four = ir.VectorType(_F32, 4)
            numbers = Emitter(context, builder).unpack(total, head_dim)
            for d in range(0, head_dim, 4):
                value = ir.Constant(four, ir.Undefined)
                for e in range(4):
                    value = builder.insert_element(value, builder.fmul(numbers[d + e], factor), ir.Constant(_I32, e))
                address = builder.gep(out, [builder.add(offset, ir.Constant(_I64, d))])
                pointer = builder.bitcast(address, ir.PointerType(four, addrspace=address.type.addrspace))
                builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(out, types.int64, vector, _FLOAT), generate

    return fill, dot, store


def gradient_operations(head_dim, columns, by_column):
    """The operations of the gradient kernels on tiles of one head_dim, a multiple of 16, and up to 16 columns of a step.

    A lane sees the first `visible` columns of a step: the others add nothing, whatever they hold. lse and delta come in one
    register each: the numbers of the lanes' own rows or, `by_column`, those of the columns, one in each lane.

    Returns
    -------
    weigh, differentiate, accumulate : numba intrinsics
    """
    vector = UniTuple(_FLOAT, head_dim)
    scores = UniTuple(_FLOAT, columns)
    zero = ir.Constant(_F32, 0.0)

    def of_column(emitter, register, t):
        return emitter.broadcast(register, t) if by_column else register

    def where_seen(emitter, t, visible, value, otherwise):
        sees = emitter.builder.icmp_signed("<", ir.Constant(_I64, t), visible)
        return emitter.builder.select(sees, value, otherwise)

    @intrinsic
    def weigh(typing_context, dots, scale, lse, visible):
        """Weights of the columns: exp2(scale * dot - lse)."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            dots, scale, lse, visible = arguments
            negative = builder.fneg(lse)
            weights = []
            for t, dot in enumerate(emitter.unpack(dots, columns)):
                weight = emitter.exp2(emitter.mad(dot, scale, of_column(emitter, negative, t)))
                weights.append(where_seen(emitter, t, visible, weight, zero))
            return emitter.pack(scores, weights)

        return scores(scores, _FLOAT, _FLOAT, types.int64), generate

    @intrinsic
    def differentiate(typing_context, weights, dots, delta, visible):
        """Derivatives of the scores: weight * (dot - delta)."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            weights, dots = (emitter.unpack(x, columns) for x in arguments[:2])
            delta, visible = arguments[2:]
            derivatives = []
            for t, (weight, dot) in enumerate(zip(weights, dots, strict=True)):
                derivative = builder.fmul(weight, builder.fsub(dot, of_column(emitter, delta, t)))
                derivatives.append(where_seen(emitter, t, visible, derivative, zero))
            return emitter.pack(scores, derivatives)

        return scores(scores, scores, _FLOAT, types.int64), generate

    @intrinsic
    def accumulate(typing_context, total, factors, x, offset, stride, available, visible):
        """Add the columns times their factors."""

        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder)
            total, factors = emitter.unpack(arguments[0], head_dim), emitter.unpack(arguments[1], columns)
            x, offset, stride, available, visible = arguments[2:]
            for t, (factor, place) in enumerate(zip(factors, emitter.rows(offset, stride, columns, available), strict=True)):
                numbers = emitter.row(x, place, head_dim)
                for d, number in enumerate(numbers):
                    # 0 times nan is nan, so it is the sum that is chosen, and at once: what waits for it would spill
                    total[d] = where_seen(emitter, t, visible, emitter.mad(factor, number, total[d]), total[d])
            return emitter.pack(vector, total)

        return vector(vector, scores, x, types.int64, types.int64, types.int64, types.int64), generate

    return weigh, differentiate, accumulate
