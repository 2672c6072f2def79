"""What a cache of 8 bits holds, as numbers for a matrix product.

The inline assembly keeps the conversion of four codes in two registers. Written in Triton, it is moved behind the shared
memory, and every code is read and converted by itself: about twice the instructions.
"""

import triton
import triton.language as tl

E4M3_TO_HALF = tl.constexpr(256.0)
"""An e4m3 code shifted into float16 is 2**-8 of its value: their exponents are biased by 7 and by 15.

The two codes of NaN would become +-480: a cache does not hold them, its scales carry NaN.
"""

# Bytes 0 .. 3 of $2 -> float16 pairs $0 and $1, exactly.
_INT8 = tl.constexpr("""{
    .reg .b32 raised, bias;
    xor.b32 raised, $2, 0x80808080;
    mov.b32 bias, 0x64806480;
    prmt.b32 $0, raised, 0x64646464, 0x4140;
    prmt.b32 $1, raised, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, bias;
    sub.f16x2 $1, $1, bias;
}""")  # code + 128 in the low byte of 1024.0 makes 1024 + 128 + code, and 0x6480 is 1152.0
_E4M3_BITS = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    shr.u32 c, a, 1;
    shr.u32 d, b, 1;
    and.b32 c, c, 0x3f803f80;
    and.b32 d, d, 0x3f803f80;
    lop3.b32 $0, a, 0x80008000, c, 0xEA;
    lop3.b32 $1, b, 0x80008000, d, 0xEA;
}""")  # each code in the high byte of a half; exponent and mantissa move down by one, the sign stays
_E4M3 = tl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")  # from compute capability 8.9 on


@triton.jit
def halves(codes, CODE: tl.constexpr, INLINE: tl.constexpr):
    """Codes as float16, subnormals included.

    Args:
        codes: A tensor of int8, or of uint8 for e4m3, with a multiple of four elements per thread.
        CODE: "int8", "e4m3", or "e4m3 bits": those are 1 / `E4M3_TO_HALF` of their value, on any GPU.
        INLINE: Use the assembly. The interpreter has none, and no "e4m3".
    """
    if INLINE:
        ASSEMBLY: tl.constexpr = _INT8 if CODE == "int8" else _E4M3 if CODE == "e4m3" else _E4M3_BITS
        # Not pure: a pure one may be moved behind the shared memory.
        result = tl.inline_asm_elementwise(ASSEMBLY, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=False, pack=4)
    elif CODE == "int8":
        result = codes.to(tl.float16)
    else:
        wide = codes.to(tl.uint16)
        result = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return result
