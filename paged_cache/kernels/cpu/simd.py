"""Sixteen float32 lanes as a numba type, and their arithmetic: what the CPU kernel is written in.

LLVM maps the lanes to one AVX-512 register, two of AVX2 or four of NEON. Arithmetic is here, memory in `simd_memory.py`.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model

LANES = 16
intrinsic: Any = extending.intrinsic  # what it makes is called without `typingctx`

FLOAT, I32 = ir.FloatType(), ir.IntType(32)
_FAST = ("reassoc", "contract", "nsz")  # fast maths that keeps infinities and NaN


def wide(element: ir.Type) -> ir.VectorType:
    """Sixteen elements."""
    return ir.VectorType(element, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, wide(FLOAT))


def broadcast(builder, scalar, width: int = LANES):
    """A scalar in all lanes."""
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, width), [0] * width))


def constant(value: float):
    """Sixteen times a float32."""
    return ir.Constant(wide(FLOAT), [value] * LANES)


def int_constant(value: int):
    """Sixteen times an int32."""
    return ir.Constant(wide(I32), [value] * LANES)


def call(builder, name: str, result, args, fast=()):
    """Calls a function of LLVM by its name."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args, fastmath=fast)


@intrinsic
def splat(typingctx, scalar):
    """The same float32 in every lane."""

    def codegen(context, builder, signature, args):
        return broadcast(builder, args[0])

    return vector(types.float32), codegen


def emit_add(builder, a, b):
    """Sum of two vectors, in any order of additions."""
    return builder.fadd(a, b, flags=_FAST)


def _mul(builder, a, b):
    return builder.fmul(a, b, flags=_FAST)


def _fma(builder, a, b, c):
    return emit_add(builder, _mul(builder, a, b), c)


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def shuffle(builder, x, y, lanes):
    """The given lanes of x and, from `LANES` on, y."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _reduce(builder, combine, x):
    for half in (8, 4, 2, 1):
        x = combine(
            builder,
            *(
                builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, half), part))
                for part in (list(range(half)), list(range(half, 2 * half)))
            ),
        )
    return builder.extract_element(x, I32(0))


_EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2)
_EXP2 += (2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # Cephes: 2 ** f on [-0.5, 0.5]


def _exp2(builder, x):
    clamped = builder.select(builder.fcmp_ordered("<", x, constant(-126.0)), constant(-126.0), x)
    clamped = builder.select(builder.fcmp_ordered(">", clamped, constant(127.0)), constant(127.0), clamped)
    whole = call(builder, f"llvm.rint.v{LANES}f32", x.type, [clamped])
    rest = builder.fsub(clamped, whole)
    power = constant(_EXP2[0])
    for coefficient in _EXP2[1:]:
        power = _fma(builder, power, rest, constant(coefficient))
    exponent = builder.shl(builder.fptosi(whole, wide(I32)), int_constant(23))
    result = builder.bitcast(builder.add(builder.bitcast(power, wide(I32)), exponent), wide(FLOAT))
    return builder.select(builder.fcmp_ordered("<", x, constant(-126.0)), constant(0.0), result)


_TANH = (62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0)  # Taylor, for small x


def _tanh(builder, x):
    square = builder.fmul(x, x)
    small = constant(_TANH[0])
    for coefficient in _TANH[1:]:
        small = _fma(builder, small, square, constant(coefficient))
    power = _exp2(builder, builder.fmul(x, constant(2.8853900817779268)))
    large = builder.fsub(constant(1.0), builder.fdiv(constant(2.0), builder.fadd(power, constant(1.0))))
    return builder.select(builder.fcmp_ordered("<", square, constant(0.09)), builder.fmul(x, small), large)


@intrinsic
def lanes(typingctx):
    """0, 1, … 15."""
    return vector(), lambda context, builder, signature, args: ir.Constant(
        wide(FLOAT), [float(i) for i in range(LANES)]
    )


def _unary(emit, result=vector):
    @intrinsic
    def operation(typingctx, a):
        return result(vector), lambda context, builder, signature, args: emit(builder, *args)

    return operation


def _binary(emit):
    @intrinsic
    def operation(typingctx, a, b):
        return vector(vector, vector), lambda context, builder, signature, args: emit(builder, *args)

    return operation


def _ternary(emit):
    @intrinsic
    def operation(typingctx, a, b, c):
        return vector(vector, vector, vector), lambda context, builder, signature, args: emit(builder, *args)

    return operation


add = _binary(emit_add)
sub = _binary(lambda builder, a, b: builder.fsub(a, b, flags=_FAST))
mul = _binary(_mul)
fma = _ternary(_fma)  # a * b + c
maximum = _binary(_larger)
lane_sum = _unary(lambda builder, x: _reduce(builder, emit_add, x), types.float32)
lane_max = _unary(lambda builder, x: _reduce(builder, _larger, x), types.float32)
exp2 = _unary(_exp2)  # relative error below 2e-7; 0 below 2 ** -126
tanh = _unary(_tanh)
