"""Sixteen float32 lanes as a numba type, and the operations that the CPU kernel is written in.

LLVM maps the lanes to one AVX-512 register, two of AVX2 or four of NEON. Addresses are plain int64, indices count elements.
The type of `kind` chooses how an element is stored: float32, bfloat16 (uint16 in numba) or float16 (int16).
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_FLOAT, _HALF, _I16, _I32 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)
_STORED = {types.float32: _FLOAT, types.uint16: _I16, types.int16: _HALF}
_FAST = ("reassoc", "contract", "nsz")  # fast maths that keeps infinities and NaN


def _wide(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, _wide(_FLOAT))


def _splat(builder, scalar, width: int = LANES):
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, width), [0] * width))


def _const(value: float):
    return ir.Constant(_wide(_FLOAT), [value] * LANES)


def _iconst(value: int):
    return ir.Constant(_wide(_I32), [value] * LANES)


def _element_pointer(builder, address, index, element):
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


def _widen(builder, raw, kind):
    """[16] stored elements -> [16] float32."""
    if kind == types.uint16:
        bits = builder.shl(builder.zext(raw, _wide(_I32)), _iconst(16))
        return builder.bitcast(bits, _wide(_FLOAT))
    return builder.fpext(raw, _wide(_FLOAT)) if kind == types.int16 else raw


def _narrow(builder, value, kind):
    """[16] float32 -> [16] stored elements, rounded to nearest even."""
    if kind == types.int16:
        return builder.fptrunc(value, _wide(_HALF))
    if kind == types.uint16:
        bits = builder.bitcast(value, _wide(_I32))
        odd = builder.and_(builder.lshr(bits, _iconst(16)), _iconst(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _iconst(0x7FFF))), _iconst(16))
        nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(nan, _iconst(0x7FC0), rounded), _wide(_I16))
    return value


def _call(builder, name: str, result, args, fast=()):
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args, fastmath=fast)


def _lanes_below(builder, count):
    lanes = ir.Constant(_wide(ir.IntType(64)), list(range(LANES)))
    return builder.icmp_signed("<", lanes, _splat(builder, count))


@intrinsic
def load(typingctx, address, index, kind):
    """Sixteen elements from `address`, as float32."""

    def codegen(context, builder, signature, args):
        element = _STORED[kind]
        pointer = _element_pointer(builder, args[0], args[1], element)
        raw = builder.load(builder.bitcast(pointer, _wide(element).as_pointer()))
        raw.align = element.get_abi_size(context.target_data)
        return _widen(builder, raw, kind)

    return vector(types.int64, types.int64, kind), codegen


@intrinsic
def load_part(typingctx, address, index, kind, count):
    """The first `count` lanes from `address`, zeros in the others, whose memory is not touched."""

    def codegen(context, builder, signature, args):
        element = _STORED[kind]
        element = _I16 if element == _HALF else element  # masked loads of halves are not legal everywhere
        wide = _wide(element)
        pointer = builder.bitcast(_element_pointer(builder, args[0], args[1], element), wide.as_pointer())
        mask, zeros = _lanes_below(builder, args[3]), ir.Constant(wide, None)
        align = _I32(element.get_abi_size(context.target_data))
        suffix = "f32" if element == _FLOAT else "i16"
        raw = _call(builder, f"llvm.masked.load.v{LANES}{suffix}.p0", wide, [pointer, align, mask, zeros])
        raw = builder.bitcast(raw, _wide(_HALF)) if kind == types.int16 else raw
        return _widen(builder, raw, kind)

    return vector(types.int64, types.int64, kind, types.int64), codegen


@intrinsic
def store_part(typingctx, address, index, value, kind, count):
    """Writes the first `count` lanes, rounded to the stored type."""

    def codegen(context, builder, signature, args):
        raw = _narrow(builder, args[2], kind)
        raw = builder.bitcast(raw, _wide(_I16)) if kind == types.int16 else raw
        element = raw.type.element
        pointer = _element_pointer(builder, args[0], args[1], element)
        pointer = builder.bitcast(pointer, raw.type.as_pointer())
        align = _I32(element.get_abi_size(context.target_data))
        suffix = "f32" if element == _FLOAT else "i16"
        mask = _lanes_below(builder, args[4])
        _call(builder, f"llvm.masked.store.v{LANES}{suffix}.p0", ir.VoidType(), [raw, pointer, align, mask])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector, kind, types.int64), codegen


@intrinsic
def store(typingctx, address, index, value):
    """Writes sixteen float32."""

    def codegen(context, builder, signature, args):
        pointer = _element_pointer(builder, args[0], args[1], _FLOAT)
        builder.store(args[2], builder.bitcast(pointer, _wide(_FLOAT).as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), codegen


@intrinsic
def prefetch(typingctx, address, index, kind):
    """Asks for the cache line of an element."""

    def codegen(context, builder, signature, args):
        pointer = _element_pointer(builder, args[0], args[1], _STORED[kind])
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, kind), codegen


@intrinsic
def peek(typingctx, address, index, kind):
    """One number of the type of `kind` (int32 or float32)."""

    def codegen(context, builder, signature, args):
        return builder.load(_element_pointer(builder, args[0], args[1], context.get_value_type(kind)))

    return kind(types.int64, types.int64, kind), codegen


@intrinsic
def poke(typingctx, address, index, number):
    """Writes one float32."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _element_pointer(builder, args[0], args[1], _FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def address_of(typingctx, pointer):
    """A C pointer as int64."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(types.voidptr), codegen


@intrinsic
def splat(typingctx, scalar):
    """The same float32 in every lane."""

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0])

    return vector(types.float32), codegen


def _add(builder, a, b):
    return builder.fadd(a, b, flags=_FAST)


def _mul(builder, a, b):
    return builder.fmul(a, b, flags=_FAST)


def _fma(builder, a, b, c):
    return _add(builder, _mul(builder, a, b), c)


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _fold(builder, combine, x, y, half: int, width: int):
    """Combines the two halves of every group of 2 * `half` lanes of x and y; `width` lanes are left."""
    low = [i for i in range(2 * width) if i % (2 * half) < half]
    shape = ir.VectorType(_I32, width)
    first = builder.shuffle_vector(x, y, ir.Constant(shape, low))
    second = builder.shuffle_vector(x, y, ir.Constant(shape, [i + half for i in low]))
    return combine(builder, first, second)


def _reduce(builder, combine, x):
    for half in (8, 4, 2, 1):
        x = _fold(builder, combine, x, x, half, half)
    return builder.extract_element(x, _I32(0))


@intrinsic
def store_sums(typingctx, address, index, a, b, c, d):
    """Writes the lane sums of four vectors, side by side, as float32: one reduction tree for all four."""

    def codegen(context, builder, signature, args):
        ab, cd = (_fold(builder, _add, x, y, 8, 16) for x, y in (args[2:4], args[4:6]))
        sums = _fold(builder, _add, ab, cd, 4, 16)  # four lanes of each vector
        sums = _fold(builder, _add, sums, sums, 2, 8)
        sums = _fold(builder, _add, sums, sums, 1, 4)
        pointer = _element_pointer(builder, args[0], args[1], _FLOAT)
        builder.store(sums, builder.bitcast(pointer, sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector, vector, vector, vector), codegen


_EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2)
_EXP2 += (2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # Cephes: 2 ** f on [-0.5, 0.5]


def _exp2(builder, x):
    clamped = builder.select(builder.fcmp_ordered("<", x, _const(-126.0)), _const(-126.0), x)
    clamped = builder.select(builder.fcmp_ordered(">", clamped, _const(127.0)), _const(127.0), clamped)
    whole = _call(builder, f"llvm.rint.v{LANES}f32", x.type, [clamped])
    rest = builder.fsub(clamped, whole)
    power = _const(_EXP2[0])
    for coefficient in _EXP2[1:]:
        power = _fma(builder, power, rest, _const(coefficient))
    exponent = builder.shl(builder.fptosi(whole, _wide(_I32)), _iconst(23))
    result = builder.bitcast(builder.add(builder.bitcast(power, _wide(_I32)), exponent), _wide(_FLOAT))
    return builder.select(builder.fcmp_ordered("<", x, _const(-126.0)), _const(0.0), result)


_TANH = (62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0)  # Taylor, for small x


def _tanh(builder, x):
    square = builder.fmul(x, x)
    small = _const(_TANH[0])
    for coefficient in _TANH[1:]:
        small = _fma(builder, small, square, _const(coefficient))
    power = _exp2(builder, builder.fmul(x, _const(2.8853900817779268)))
    large = builder.fsub(_const(1.0), builder.fdiv(_const(2.0), builder.fadd(power, _const(1.0))))
    return builder.select(builder.fcmp_ordered("<", square, _const(0.09)), builder.fmul(x, small), large)


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


add = _binary(_add)
sub = _binary(lambda builder, a, b: builder.fsub(a, b, flags=_FAST))
mul = _binary(_mul)
fma = _ternary(_fma)  # a * b + c
maximum = _binary(_larger)
lane_sum = _unary(lambda builder, x: _reduce(builder, _add, x), types.float32)
lane_max = _unary(lambda builder, x: _reduce(builder, _larger, x), types.float32)
exp2 = _unary(_exp2)  # relative error below 2e-7; 0 below 2 ** -126
tanh = _unary(_tanh)


@intrinsic
def atomic_add(typingctx, address, amount):
    """Adds to the int64 at `address`; returns what was there before."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen
