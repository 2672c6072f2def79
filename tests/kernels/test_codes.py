"""The inline assembly that turns codes of 8 bits into float16, run instruction by instruction, and where it is used."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from paged_cache.kernels.triton import attention, codes, config


def prmt(a: int, b: int, selector: int) -> int:
    """Each nibble of `selector` picks one of the eight bytes of b:a; none here asks for its sign."""
    source = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit what `table` holds at the place a:b:c."""
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def floats(word: int) -> torch.Tensor:
    """The two halves of a word, lower one first."""
    return torch.frombuffer(bytearray(word.to_bytes(4, "little")), dtype=torch.float16)


def sub_f16x2(a: int, b: int) -> int:
    """Of both halves."""
    return int.from_bytes((floats(a) - floats(b)).view(torch.uint8).numpy().tobytes(), "little")


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, n: a >> n,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "sub.f16x2": sub_f16x2,
}


def execute(assembly: str, word: int) -> list[float]:
    """The four float16 that the assembly makes of a word of four codes."""
    registers = {"$2": word}
    for statement in re.findall(r"[^{};]+(?=;)", assembly):
        name, *operands = statement.replace(",", " ").split()
        if name == ".reg":
            continue
        target, *sources = operands
        registers[target] = INSTRUCTIONS[name](*(registers[x] if x in registers else int(x, 0) for x in sources))
    return torch.cat([floats(registers["$0"]), floats(registers["$1"])]).tolist()


@pytest.mark.parametrize(
    ("assembly", "dtype", "unit"),
    [(codes._INT8, torch.int8, 1.0), (codes._E4M3_BITS, torch.float8_e4m3fn, codes.E4M3_TO_HALF.value)],
    ids=["int8", "e4m3 bits"],
)
def test_the_assembly_is_exact(assembly: object, dtype: torch.dtype, unit: float) -> None:
    """All codes in all four places, beside other codes, signs of zeros included; NaN excepted, see `codes`."""
    values = torch.arange(256).to(torch.uint8).view(dtype).double()
    for code in range(256):
        four = [(code + offset) % 256 for offset in (0, 77, 128, 201)]
        for _ in range(4):
            four = four[1:] + four[:1]
            out = torch.tensor(execute(assembly.value, int.from_bytes(bytes(four), "little"))).double() * unit
            expected = values[four]
            ok = ~expected.isnan()
            assert torch.equal(out[ok], expected[ok])
            assert torch.equal(out[ok].signbit(), expected[ok].signbit())


def test_amd_gets_no_ptx() -> None:
    """Its GPUs have compute capabilities as well, 9.4 for instance, that mean something else."""
    properties = SimpleNamespace(multi_processor_count=304)
    with (
        mock.patch.object(torch.version, "hip", "6.4"),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 4)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        capability, num_sms = config.machine.__wrapped__(torch.device("cuda"))
    assert (capability, num_sms) == (0, 304)
    strides = ((1, 1, 1),) * 4
    cut = config.choose(16, 64, 64, torch.float16, torch.float8_e4m3fn, capability)
    launch = attention._attend.__wrapped__(
        *strides, torch.float16, torch.float8_e4m3fn, 4, 2, 64, 64, 16, cut, capability
    )
    assert not launch._constants["INLINE"]
    assert launch._constants["CODE"] == "e4m3 bits"
