"""Sub-group operations, as emitters for the tiles of register_tile.py and as numba intrinsics. Build time only."""

from __future__ import annotations

import math

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba_dpex.kernel_api_impl.spirv.target import LLVM_SPIRV_ARGS

WIDTH = 16  # lanes of a sub-group

# What the translator must be told to allow: block reads; rounding to bfloat16; vectors of more than 16 elements.
_EXTENSIONS = "+SPV_INTEL_subgroups,+SPV_INTEL_bfloat16_conversion,+SPV_INTEL_vector_compute"
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
# 2**x by powers of x, up to 0.5, to the last bit of float64
_EXP2 = [math.log(2) ** n / math.factorial(n) for n in range(14)]


class Emitter:
    """Emits LLVM for one intrinsic whose numbers have one floating type: calls of built-in functions, and reads of panels."""

    def __init__(self, context, builder, real=types.float32):
        self.context = context
        self.builder = builder
        self.real = context.get_value_type(real)
        self.size = real.bitwidth // 8  # in bytes
        self.letter = {4: "f", 8: "d"}[self.size]  # in mangled names
        context.extra_compile_options[LLVM_SPIRV_ARGS] = [f"--spirv-ext={_EXTENSIONS}"]

    def number(self, value):
        return ir.Constant(self.real, value)

    def call(self, symbol, result, arguments, *, convergent=False):
        function_type = ir.FunctionType(result, [x.type for x in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, symbol)
        function.calling_convention = "spir_func"
        function.attributes.add("nounwind")
        # what lanes exchange must not be moved into a branch
        function.attributes.add("convergent" if convergent else "readnone")
        return self.builder.call(function, arguments, cconv="spir_func")

    def mad(self, a, b, c):
        return self.call("_Z3mad" + 3 * self.letter, self.real, [a, b, c])

    def maximum(self, a, b):
        return self.call("_Z4fmax" + 2 * self.letter, self.real, [a, b])

    def minimum(self, a, b):
        return self.call("_Z4fmin" + 2 * self.letter, self.real, [a, b])

    def exp2(self, x):
        """2**x: of float32 by the function of the hardware. That of the library for float64 takes branches and registers."""
        if self.size == 4:
            return self.call("_Z4exp2f", self.real, [x])
        builder, i64 = self.builder, ir.IntType(64)
        # not below the bounds is nan, too; at them the field of the exponent is that of 0 and infinity
        for sign, bound in (("<", -1023.0), (">", 1024.0)):
            x = builder.select(builder.fcmp_ordered(sign, x, self.number(bound)), self.number(bound), x)
        # adding 1.5 * 2**52 rounds x to the integer that then stands in the low bits
        shifted = builder.fadd(x, self.number(1.5 * 2.0**52))
        fraction = builder.fsub(x, builder.fsub(shifted, self.number(1.5 * 2.0**52)))
        result = self.number(_EXP2[-1])
        for coefficient in _EXP2[-2::-1]:
            result = self.mad(result, fraction, self.number(coefficient))
        exponent = builder.add(builder.bitcast(shifted, i64), ir.Constant(i64, 1023))
        return builder.fmul(result, builder.bitcast(builder.shl(exponent, ir.Constant(i64, 52)), self.real))

    def broadcast(self, register, lane):
        letter = "i" if register.type == _I32 else self.letter
        lane = ir.Constant(_I32, lane)
        return self.call(f"_Z19sub_group_broadcast{letter}j", register.type, [register, lane], convergent=True)

    def block_read(self, pointer, index, count):
        """Registers with `count` * 16 consecutive numbers: number 16 i + e is lane e of register i."""
        builder = self.builder
        bits, suffix, letter = (_I32, "", "j") if self.size == 4 else (_I64, "_ul", "m")
        address_space = pointer.type.addrspace
        address = builder.bitcast(builder.gep(pointer, [index]), ir.PointerType(bits, addrspace=address_space))
        name = f"intel_sub_group_block_read{suffix}{count if count > 1 else ''}"
        symbol = f"_Z{len(name)}{name}PU3AS{address_space}K{letter}"
        value = self.call(symbol, ir.VectorType(bits, count) if count > 1 else bits, [address], convergent=True)
        parts = [builder.extract_element(value, ir.Constant(_I32, i)) for i in range(count)] if count > 1 else [value]
        return [builder.bitcast(part, self.real) for part in parts]

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


def _index(symbol):
    @intrinsic
    def index(typing_context):
        def generate(context, builder, signature, arguments):
            return builder.zext(Emitter(context, builder).call(symbol, _I32, []), _I64)

        return types.int64(), generate

    return index


lane_index = _index("_Z22get_sub_group_local_idv")  # of the lane in its sub-group
sub_group_index = _index("_Z16get_sub_group_idv")  # of the sub-group in its work-group


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


def _of_lanes(operation):
    """The same number in all lanes, of a floating-point number in each."""

    @intrinsic
    def reduce(typing_context, x):
        def generate(context, builder, signature, arguments):
            emitter = Emitter(context, builder, x)
            symbol = f"_Z20sub_group_reduce_{operation}{emitter.letter}"
            return emitter.call(symbol, emitter.real, arguments, convergent=True)

        return x(x), generate

    return reduce


sum_of_lanes = _of_lanes("add")
maximum_of_lanes = _of_lanes("max")


@intrinsic
def transpose_fours(typing_context, words):
    """Of every four lanes, word i of lane j becomes word j of lane i."""

    def generate(context, builder, signature, arguments):
        emitter = Emitter(context, builder)
        words = emitter.unpack(arguments[0], 4)
        lane = emitter.call("_Z22get_sub_group_local_idv", _I32, [])
        for distance in (1, 2):
            is_upper = builder.icmp_signed("!=", builder.and_(lane, ir.Constant(_I32, distance)), ir.Constant(_I32, 0))
            for i in (i for i in range(4) if not i & distance):
                low, high = words[i], words[i + distance]
                sent = [builder.select(is_upper, low, high), ir.Constant(_I32, distance)]
                got = emitter.call("_Z27intel_sub_group_shuffle_xorjj", _I32, sent, convergent=True)
                words[i], words[i + distance] = builder.select(is_upper, got, low), builder.select(is_upper, high, got)
        return emitter.pack(words_type, words)

    words_type = types.UniTuple(types.uint32, 4)
    return words_type(words_type), generate


def _division(emit):
    """Of two numbers from 0 to 2**31. A 64-bit division is a loop on a GPU, after which the compiler no longer knows that all
    lanes have the same result, and every load that depends on it becomes one load per lane."""

    @intrinsic
    def divide(typing_context, a, b):
        def generate(context, builder, signature, arguments):
            return builder.zext(emit(builder, *(builder.trunc(x, _I32) for x in arguments)), _I64)

        return types.int64(types.int64, types.int64), generate

    return divide


divide = _division(ir.IRBuilder.udiv)
remainder = _division(ir.IRBuilder.urem)
