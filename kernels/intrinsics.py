"""What the numba-dpex kernel language lacks, as numba intrinsics. Build time only: nothing at run time imports this file.

Each one emits a call of an OpenCL built-in function or a few LLVM instructions. The SPIR-V of numba-dpex forbids contraction
of ``a * b + c``, so `mad` is the only way to a fused multiply-add; the work-item functions of the kernel language compile to
a form that some Intel GPU compilers reject, so `group_index` and `lane_index` call the built-ins directly.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_F32 = ir.FloatType()
_LLVM = {types.float32: _F32, types.float64: ir.DoubleType()}
_MANGLED = {types.float32: "f", types.float64: "d"}


def _call_builtin(builder, symbol, result, arguments):
    """Emit the call of the OpenCL built-in whose mangled name is `symbol`; all of them here are pure."""
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, symbol)
    function.calling_convention = "spir_func"
    function.attributes.add("nounwind")
    function.attributes.add("readnone")
    return builder.call(function, arguments, cconv="spir_func")


def _work_item_function(symbol):
    @intrinsic
    def index(typing_context):
        def generate(context, builder, signature, arguments):
            return _call_builtin(builder, symbol, _I64, [ir.Constant(_I32, 0)])

        return types.int64(), generate

    return index


group_index = _work_item_function("_Z12get_group_idj")
lane_index = _work_item_function("_Z12get_local_idj")


@intrinsic
def mad(typing_context, a, b, c):
    """``a * b + c`` with one rounding or fewer, in the type of the arguments."""
    if not a == b == c or a not in _LLVM:
        raise TypingError(f"mad takes three values of one floating type, not {a}, {b}, {c}")

    def generate(context, builder, signature, arguments):
        return _call_builtin(builder, "_Z3mad" + 3 * _MANGLED[a], _LLVM[a], list(arguments))

    return a(a, a, a), generate


def inlined(function):
    """The function for use in kernels: numba puts its code where it is called, before it looks at types.

    So arguments may be private arrays, which must not reach a function that is really called: they would be memory.
    """
    return njit(inline="always")(function)


@inlined
def element(at, b, head, row):
    """The number of the first element of a row of an array, in its memory."""
    return at.offset + b * at.batch + head * at.head + row * at.seq


def _exp_coefficients(degree):
    """Polynomial for 2**x on [-0.5, 0.5] that is least squares in relative error at Chebyshev nodes, and exactly 1 at 0.

    Exactly, because a running sum is multiplied by exp(0) for every block of keys that does not raise the maximum.
    """
    x = 0.5 * np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    powers = np.vander(x, degree + 1, increasing=True)[:, 1:]
    rest = np.linalg.lstsq(powers / 2.0 ** x[:, None], (2.0**x - 1) / 2.0**x, rcond=None)[0]
    return [1.0, *(float(np.float32(c)) for c in rest)]


_EXP = _exp_coefficients(5)


def _exp_float32(builder, x):
    """exp(x) for x <= 0 to 2e-7: 0 at and below -88.03, nan for nan. Inline, the library call does not vectorise as well.

    With y = x log2(e), adding 1.5 * 2**23 rounds y to the integer n that then stands in the low bits; the polynomial takes
    y - n, and n goes into the exponent field of the scale. At n = -127 that field is 0, so the scale, and with it the result,
    is exactly 0.
    """

    def constant(value):
        return ir.Constant(_F32, value)

    def mad(a, b, c):
        return _call_builtin(builder, "_Z3madfff", _F32, [a, b, c])

    log2e = constant(float(np.float32(np.log2(np.e))))
    lowest = constant(float(np.float32(-127 * np.log(2))))
    # ordered comparison: nan is not below the bound and passes through
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    shifted = mad(x, log2e, constant(12582912.0))
    fraction = mad(x, log2e, builder.fsub(constant(12582912.0), shifted))
    result = constant(_EXP[-1])
    for coefficient in _EXP[-2::-1]:
        result = mad(result, fraction, constant(coefficient))
    exponent = builder.add(builder.bitcast(shifted, _I32), ir.Constant(_I32, 127))
    scale = builder.bitcast(builder.shl(exponent, ir.Constant(_I32, 23)), _F32)
    return builder.fmul(result, scale)


@intrinsic
def exp(typing_context, x):
    """e**x for x <= 0; 0 for -inf and nan for nan."""
    if x not in _LLVM:
        raise TypingError(f"exp takes float32 or float64, not {x}")

    def generate(context, builder, signature, arguments):
        if x == types.float32:
            return _exp_float32(builder, arguments[0])
        return _call_builtin(builder, "_Z3expd", _LLVM[x], [arguments[0]])

    return x(x), generate


def _conversion(source, target):
    """Make an intrinsic of one argument from the function that emits its code."""

    def wrap(emit):
        @intrinsic
        def convert(typing_context, x):
            if x != source:
                raise TypingError(f"the conversion takes {source}, not {x}")

            def generate(context, builder, signature, arguments):
                return emit(builder, arguments[0])

            return target(x), generate

        return convert

    return wrap


@_conversion(types.uint16, types.float32)
def _bfloat16_to_float32(builder, x):
    return builder.bitcast(builder.shl(builder.zext(x, _I32), ir.Constant(_I32, 16)), _F32)


def bfloat16_of(builder, x):
    """Rounds to the nearest, ties to even; a nan stays one, whose payload the rounding could carry over to infinity."""
    bits = builder.bitcast(x, _I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
    quiet = builder.or_(bits, ir.Constant(_I32, 0x400000))
    result = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
    return builder.trunc(builder.lshr(result, ir.Constant(_I32, 16)), _I16)


_bfloat16_from_float32 = _conversion(types.float32, types.uint16)(bfloat16_of)


@_conversion(types.uint16, types.float32)
def _float16_to_float32(builder, x):
    return builder.fpext(builder.bitcast(x, ir.HalfType()), _F32)


@_conversion(types.float32, types.uint16)
def _float16_from_float32(builder, x):
    return builder.bitcast(builder.fptrunc(x, ir.HalfType()), _I16)


def _or_special(builder, code, x, largest, infinite, nan):
    """The code of a number, or that of an infinity, whose sign it may not have, or that of nan."""
    bits = builder.select(builder.fcmp_ordered(">", x, ir.Constant(_F32, largest)), ir.Constant(_I32, infinite), code)
    return builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(_I32, nan), bits)


@_conversion(types.float32, types.uint8)
def _int8_from_float32(builder, x):
    """Rounds to the nearest, ties to even: adding 1.5 * 2**23 leaves the integer in the low bits."""
    code = builder.bitcast(builder.fadd(x, ir.Constant(_F32, 12582912.0)), _I32)
    code = _or_special(builder, code, x, 126.5, 127, 128)
    lowest = builder.fcmp_ordered("<", x, ir.Constant(_F32, -126.5))
    return builder.trunc(builder.select(lowest, ir.Constant(_I32, -127), code), _I8)


@_conversion(types.uint8, types.float32)
def _int8_to_float32(builder, code):
    number = builder.sitofp(code, _F32)
    for special, value in ((127, math.inf), (-127, -math.inf), (-128, math.nan)):
        number = builder.select(builder.icmp_signed("==", code, ir.Constant(_I8, special)), ir.Constant(_F32, value), number)
    return number


@_conversion(types.float32, types.uint8)
def _float8_e4m3_from_float32(builder, x):
    """Rounds to the nearest, ties to even. Below 2**-6 the codes are multiples of 2**-9, to which adding 2**14 rounds."""
    bits = builder.bitcast(x, _I32)
    size_bits = builder.and_(bits, ir.Constant(_I32, 0x7FFFFFFF))
    size = builder.bitcast(size_bits, _F32)
    odd = builder.and_(builder.lshr(size_bits, ir.Constant(_I32, 20)), ir.Constant(_I32, 1))
    rounded = builder.add(size_bits, builder.add(odd, ir.Constant(_I32, 0x7FFFF)))
    normal = builder.sub(builder.lshr(rounded, ir.Constant(_I32, 20)), ir.Constant(_I32, (127 - 7) << 3))
    shifted = builder.bitcast(builder.fadd(size, ir.Constant(_F32, 16384.0)), _I32)
    small = builder.sub(shifted, ir.Constant(_I32, 0x46800000))  # the bits of 2**14
    code = builder.select(builder.fcmp_ordered("<", size, ir.Constant(_F32, 2.0**-6)), small, normal)
    code = _or_special(builder, code, size, 448.0, 0x7E, 0x7F)
    sign = builder.and_(builder.lshr(bits, ir.Constant(_I32, 24)), ir.Constant(_I32, 0x80))
    return builder.trunc(builder.or_(code, sign), _I8)


@_conversion(types.uint8, types.float32)
def _float8_e4m3_to_float32(builder, code):
    code = builder.zext(code, _I32)
    size = builder.and_(code, ir.Constant(_I32, 0x7F))
    bits = builder.add(builder.shl(size, ir.Constant(_I32, 20)), ir.Constant(_I32, (127 - 7) << 23))
    small = builder.fmul(builder.uitofp(size, _F32), ir.Constant(_F32, 2.0**-9))
    number = builder.select(builder.icmp_unsigned("<", size, ir.Constant(_I32, 8)), small, builder.bitcast(bits, _F32))
    for special, value in ((0x7E, math.inf), (0x7F, math.nan)):
        number = builder.select(builder.icmp_unsigned("==", size, ir.Constant(_I32, special)), ir.Constant(_F32, value), number)
    sign = builder.shl(builder.and_(code, ir.Constant(_I32, 0x80)), ir.Constant(_I32, 24))
    return builder.bitcast(builder.or_(builder.bitcast(number, _I32), sign), _F32)


@intrinsic
def bits_of(typing_context, x):
    """The bits of a float32 as an integer."""

    def generate(context, builder, signature, arguments):
        return builder.zext(builder.bitcast(arguments[0], _I32), _I64)

    return types.int64(types.float32), generate


@intrinsic
def float_of(typing_context, bits):
    """The float32 of these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.trunc(arguments[0], _I32), _F32)

    return types.float32(types.int64), generate


@intrinsic
def _same(typing_context, x):
    def generate(context, builder, signature, arguments):
        return arguments[0]

    return x(x), generate


CONVERSIONS = {
    None: _same,
    "bfloat16_to_float32": _bfloat16_to_float32,
    "bfloat16_from_float32": _bfloat16_from_float32,
    "float16_to_float32": _float16_to_float32,
    "float16_from_float32": _float16_from_float32,
    "int8_to_float32": _int8_to_float32,
    "int8_from_float32": _int8_from_float32,
    "float8_e4m3_to_float32": _float8_e4m3_to_float32,
    "float8_e4m3_from_float32": _float8_e4m3_from_float32,
}
