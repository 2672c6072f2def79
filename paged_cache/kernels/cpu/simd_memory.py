"""Reading and writing memory for `simd.py`'s lanes.

Addresses are plain int64, indices count elements. The type of `kind` chooses how an element is stored: float32, bfloat16
(uint16 in numba), float16 (int16), int8 or float8_e4m3fn (uint8; what is read is 2 ** -8 of it).
"""
# mypy: allow-untyped-defs, allow-untyped-calls

from llvmlite import ir
from numba import types

from .simd import (
    FLOAT,
    I32,
    LANES,
    broadcast,
    call,
    emit_add,
    int_constant,
    intrinsic,
    shuffle,
    vector,
    wide,
)

_HALF, _I16, _I8 = ir.HalfType(), ir.IntType(16), ir.IntType(8)
_STORED = {types.float32: FLOAT, types.uint16: _I16, types.int16: _HALF, types.int8: _I8, types.uint8: _I8}


def _element_pointer(builder, address, index, element):
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


def _widen(builder, raw, kind):
    """[16] stored elements -> [16] float32."""
    if kind == types.uint16:
        bits = builder.shl(builder.zext(raw, wide(I32)), int_constant(16))
        return builder.bitcast(bits, wide(FLOAT))
    if kind == types.int8:
        return builder.sitofp(raw, wide(FLOAT))
    if kind == types.uint8:
        raw = _half_from_e4m3(builder, raw)
    return raw if kind == types.float32 else builder.fpext(raw, wide(FLOAT))


def _half_from_e4m3(builder, raw):
    """Exponent and mantissa fit into a half's as they are, which divides by 2 ** 8, subnormals included."""
    bits = builder.shl(builder.sext(raw, wide(_I16)), _lanes(_I16, 7))
    bits = builder.and_(bits, _lanes(_I16, 0xBFFF))
    nan = builder.icmp_unsigned("==", builder.and_(raw, _lanes(_I8, 0x7F)), _lanes(_I8, 0x7F))
    return builder.bitcast(builder.select(nan, _lanes(_I16, 0x7E00), bits), wide(_HALF))


def _lanes(element, value):
    return ir.Constant(wide(element), [value] * LANES)


def _narrow(builder, value, kind):
    """[16] float32 -> [16] stored elements, rounded to nearest even."""
    if kind == types.int16:
        return builder.fptrunc(value, wide(_HALF))
    if kind == types.uint16:
        bits = builder.bitcast(value, wide(I32))
        odd = builder.and_(builder.lshr(bits, int_constant(16)), int_constant(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, int_constant(0x7FFF))), int_constant(16))
        nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(nan, int_constant(0x7FC0), rounded), wide(_I16))
    return value


def _lanes_below(builder, count):
    lanes = ir.Constant(wide(ir.IntType(64)), list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, count))


@intrinsic
def load(typingctx, address, index, kind):
    """Sixteen elements from `address`, as float32."""

    def codegen(context, builder, signature, args):
        element = _STORED[kind]
        pointer = _element_pointer(builder, args[0], args[1], element)
        raw = builder.load(builder.bitcast(pointer, wide(element).as_pointer()))
        raw.align = element.get_abi_size(context.target_data)
        return _widen(builder, raw, kind)

    return vector(types.int64, types.int64, kind), codegen


@intrinsic
def load_part(typingctx, address, index, kind, count):
    """The first `count` lanes from `address`, zeros in the others, whose memory is not touched."""

    def codegen(context, builder, signature, args):
        element = _STORED[kind]
        element = _I16 if element == _HALF else element  # masked loads of halves are not legal everywhere
        row = wide(element)
        pointer = builder.bitcast(_element_pointer(builder, args[0], args[1], element), row.as_pointer())
        mask, zeros = _lanes_below(builder, args[3]), ir.Constant(row, None)
        align = I32(element.get_abi_size(context.target_data))
        suffix = "f32" if element == FLOAT else f"i{element.width}"
        raw = call(builder, f"llvm.masked.load.v{LANES}{suffix}.p0", row, [pointer, align, mask, zeros])
        raw = builder.bitcast(raw, wide(_HALF)) if kind == types.int16 else raw
        return _widen(builder, raw, kind)

    return vector(types.int64, types.int64, kind, types.int64), codegen


@intrinsic
def store_part(typingctx, address, index, value, kind, count):
    """Writes the first `count` lanes, rounded to the stored type."""

    def codegen(context, builder, signature, args):
        raw = _narrow(builder, args[2], kind)
        raw = builder.bitcast(raw, wide(_I16)) if kind == types.int16 else raw
        element = raw.type.element
        pointer = _element_pointer(builder, args[0], args[1], element)
        pointer = builder.bitcast(pointer, raw.type.as_pointer())
        align = I32(element.get_abi_size(context.target_data))
        suffix = "f32" if element == FLOAT else "i16"
        mask = _lanes_below(builder, args[4])
        call(builder, f"llvm.masked.store.v{LANES}{suffix}.p0", ir.VoidType(), [raw, pointer, align, mask])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector, kind, types.int64), codegen


@intrinsic
def store(typingctx, address, index, value):
    """Writes sixteen float32."""

    def codegen(context, builder, signature, args):
        pointer = _element_pointer(builder, args[0], args[1], FLOAT)
        builder.store(args[2], builder.bitcast(pointer, wide(FLOAT).as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), codegen


@intrinsic
def prefetch(typingctx, address):
    """Asks for the cache line at an address."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def peek(typingctx, address, index, kind):
    """One number of the type of `kind`."""

    def codegen(context, builder, signature, args):
        return builder.load(_element_pointer(builder, args[0], args[1], context.get_value_type(kind)))

    return kind(types.int64, types.int64, kind), codegen


@intrinsic
def poke(typingctx, address, index, number):
    """Writes one number (int64 or float32)."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _element_pointer(builder, args[0], args[1], args[2].type))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, number), codegen


@intrinsic
def as_pointer(typingctx, address):
    """An int64 as a C pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def address_of(typingctx, pointer):
    """A C pointer as int64."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(types.voidptr), codegen


def _pairs(builder, x, y, size):
    """x and y by turns in groups of `size` lanes: the first half of each four lanes plus the second."""
    groups = [[i + j + from_ for from_ in (0, LANES) for j in range(size)] for i in range(0, 2, size)]
    low = [quarter + i for quarter in range(0, LANES, 4) for group in groups for i in group]
    return emit_add(builder, shuffle(builder, x, y, low), shuffle(builder, x, y, [i + 2 for i in low]))


def _quads(builder, a, b, c, d):
    """Four vectors as one: each four lanes hold partial sums of a, b, c and d."""
    return _pairs(builder, _pairs(builder, a, b, 1), _pairs(builder, c, d, 1), 2)


@intrinsic
def store_sums(typingctx, first, second, a, b, c, d, e, f, g, h):
    """Writes lane sums as float32: those of a, b, c, d to the address `first`, of e, f, g, h to `second`."""

    def codegen(context, builder, signature, args):
        x, y = _quads(builder, *args[2:6]), _quads(builder, *args[6:10])
        low = [i for i in range(2 * LANES) if i % 8 < 4]
        x = emit_add(builder, shuffle(builder, x, y, low), shuffle(builder, x, y, [i + 4 for i in low]))
        for address, lane in ((args[0], 0), (args[1], 8)):
            parts = (shuffle(builder, x, x, list(range(i, i + 4))) for i in (lane, lane + 4))
            sums = emit_add(builder, *parts)
            builder.store(sums, builder.inttoptr(address, sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, *[vector] * 8), codegen


@intrinsic
def atomic_add(typingctx, address, amount):
    """Adds to the int64 at `address`; returns what was there before."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen
