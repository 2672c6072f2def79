"""Reading and writing memory for `simd.py`'s lanes.

Addresses are plain int64, indices count elements. The type of `kind` chooses how an element is stored: float32, bfloat16
(uint16 in numba) or float16 (int16).
"""
# mypy: allow-untyped-defs, allow-untyped-calls

from llvmlite import ir
from numba import types

from paged_cache.kernels.simd import (
    FLOAT,
    I32,
    LANES,
    broadcast,
    call,
    emit_add,
    fold,
    int_constant,
    intrinsic,
    vector,
    wide,
)

_HALF, _I16 = ir.HalfType(), ir.IntType(16)
_STORED = {types.float32: FLOAT, types.uint16: _I16, types.int16: _HALF}


def _element_pointer(builder, address, index, element):
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


def _widen(builder, raw, kind):
    """[16] stored elements -> [16] float32."""
    if kind == types.uint16:
        bits = builder.shl(builder.zext(raw, wide(I32)), int_constant(16))
        return builder.bitcast(bits, wide(FLOAT))
    return builder.fpext(raw, wide(FLOAT)) if kind == types.int16 else raw


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
        suffix = "f32" if element == FLOAT else "i16"
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
def prefetch(typingctx, address, index, kind):
    """Asks for the cache line of an element."""

    def codegen(context, builder, signature, args):
        pointer = _element_pointer(builder, args[0], args[1], _STORED[kind])
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32(0), I32(3), I32(1)])
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
        builder.store(args[2], _element_pointer(builder, args[0], args[1], FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def address_of(typingctx, pointer):
    """A C pointer as int64."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(types.voidptr), codegen


@intrinsic
def store_sums(typingctx, address, index, a, b, c, d):
    """Writes the lane sums of four vectors, side by side, as float32: one reduction tree for all four."""

    def codegen(context, builder, signature, args):
        ab, cd = (fold(builder, emit_add, x, y, 8, 16) for x, y in (args[2:4], args[4:6]))
        sums = fold(builder, emit_add, ab, cd, 4, 16)  # four lanes of each vector
        sums = fold(builder, emit_add, sums, sums, 2, 8)
        sums = fold(builder, emit_add, sums, sums, 1, 4)
        pointer = _element_pointer(builder, args[0], args[1], FLOAT)
        builder.store(sums, builder.bitcast(pointer, sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector, vector, vector, vector), codegen


@intrinsic
def atomic_add(typingctx, address, amount):
    """Adds to the int64 at `address`; returns what was there before."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen
