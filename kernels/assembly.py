"""The lookup in PTX: eight codes of a 32-bit word become eight weights with one warp shuffle each.

Every lane keeps one register with an entry of both books: lane l holds entry l % 16, book 0 in the low half and book 1
in the high half. A shuffle with a code as source lane fetches both candidates (only the low five bits of its index
count, and both halves of the warp hold the same, so that a code needs no mask); the PRMT that packs two of them into a
pair takes the half that the group's sign chose. `tests/ptx.py` runs these strings instruction by instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _lookup(finish: str) -> str:
    """Shuffle the entries of codes 0..7 of word $8 out of book register $9 into v0..v7, then `finish`."""
    shifts = "\n".join(f"shr.u32 i{n}, $8, {4 * n};" for n in range(1, 8))
    shuffles = "\n".join(f"shfl.sync.idx.b32 v{n}, $9, i{n}, 31, -1;" for n in range(8))
    return f"{{\n.reg .b32 i<8>, v<8>, p<4>, f, z;\nmov.b32 i0, $8;\n{shifts}\n{shuffles}\n{finish}\n}}"


def _pairs(line: str) -> str:
    """Pack v0..v7 with PRMT selector $10 into p0..p3, apply `line` to each pair P and write its halves to $0..$7."""
    return "\n".join(
        f"prmt.b32 p{n}, v{2 * n}, v{2 * n + 1}, $10;\n{line.replace('P', f'p{n}')}"
        f"mov.b32 {{${2 * n}, ${2 * n + 1}}}, p{n};"
        for n in range(4)
    )


def _product(pairs: str, number: str, high: str, kind: str) -> tuple[str, str]:
    """Text that prepares a factor, and text that multiplies register `pairs` by it.

    The factor is the low half of `number` where `high` is 0, else the high one; in fp16 its magnitude, which is free. A
    multiplication takes either half of an operand, too, if it is written as halves and not as a PRMT. A product is a
    fused multiply-add with -0.0: rounded once, signs of zeros kept, and sm_80 has no bf16 multiplication.
    """
    prepare = (
        f".reg .pred q;\n.reg .b16 l, h;\nmov.b32 {{l, h}}, {number};\nsetp.eq.u32 q, {high}, 0;\n"
        "selp.b16 l, l, h, q;\nmov.b32 f, {l, l};\nmov.b32 z, 0x80008000;\n"
    )
    if kind == "f16x2":
        prepare += "abs.f16x2 f, f;\n"
    return prepare, f"fma.rn.{kind} {pairs}, {pairs}, f, z;\n"


def _scaled_lookup(kind: str) -> str:
    prepare, multiply = _product("P", "$11", "$12", kind)
    return _lookup(prepare + _pairs(multiply))


LOOKUP = tl.constexpr(_lookup(_pairs("")))
LOOKUP_BF16 = tl.constexpr(_scaled_lookup("bf16x2"))
LOOKUP_FP16 = tl.constexpr(_scaled_lookup("f16x2"))
OUTPUTS = "=h," * 8
LOOKUP_CONSTRAINTS = tl.constexpr(OUTPUTS + "r,r,r")
SCALED_CONSTRAINTS = tl.constexpr(OUTPUTS + "r,r,r,r,r")
BF16 = tl.constexpr((tl.bfloat16,) * 8)
FP16 = tl.constexpr((tl.float16,) * 8)


def _table_lookup(kind: str | None) -> str:
    """The pairs at the addresses of bytes 0..3 of word $8, in a table at `global_smem`; times a factor in `kind`.

    The low byte of their addresses is byte 0 of $9, or byte 2 where $10 is 2; bytes 1 and 3 of $9 are 0.
    """
    prepare, multiply = _product("p", "$11", "$10", kind) if kind else ("", "")
    lines = "".join(
        f"add.u32 a, $10, {0x7704 | n << 4};\nprmt.b32 a, $8, $9, a;\nadd.u32 a, a, b;\nld.shared.b32 p, [a];\n"
        f"{multiply}mov.b32 {{${2 * n}, ${2 * n + 1}}}, p;\n"
        for n in range(4)
    )
    return f"{{\n.reg .b32 a, b, p, f, z;\nmov.u32 b, global_smem;\n{prepare}{lines}}}"


TABLE_LOOKUP = tl.constexpr(_table_lookup(None))
TABLE_LOOKUP_BF16 = tl.constexpr(_table_lookup("bf16x2"))
TABLE_LOOKUP_FP16 = tl.constexpr(_table_lookup("f16x2"))
#: Two E4M3 codes, moved to the exponents of bf16 or fp16, times the difference of the exponent biases: 2^120 or 2^8.
_UNBIAS = "{\n.reg .b32 a, z;\nmov.b32 a, FACTOR;\nmov.b32 z, 0x80008000;\nfma.rn.TYPE $0, $1, a, z;\n}"
UNBIAS_BF16 = tl.constexpr(_UNBIAS.replace("FACTOR", "0x7b807b80").replace("TYPE", "bf16x2"))
UNBIAS_FP16 = tl.constexpr(_UNBIAS.replace("FACTOR", "0x5c005c00").replace("TYPE", "f16x2"))
#: Two bf16 numbers -> fp16.
HALVES_TO_FP16 = tl.constexpr(
    "{\n.reg .b32 l, h;\nshl.b32 l, $1, 16;\nand.b32 h, $1, 0xffff0000;\ncvt.rn.f16x2.f32 $0, h, l;\n}"
)
#: Sign -> PRMT selector of the low or the high halves: $2 is a selector that replicates the sign of one byte of $1.
SELECT = tl.constexpr("{\n.reg .b32 a;\nprmt.b32 a, $1, 0, $2;\nlop3.b32 $0, a, 0x2222, 0x5410, 0xea;\n}")
LANE = tl.constexpr("mov.u32 $0, %laneid;")


@triton.jit
def lane_id(like):
    """The number of the lane that holds each element, int32: whatever layout the compiler chose for `like`."""
    return tl.inline_asm_elementwise(LANE, "=r,r", [like], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def select_halves(word, byte):
    """The PRMT selector of the book that the sign of byte b of `word` chooses; `byte` is 0x1111 * (8 + b)."""
    return tl.inline_asm_elementwise(SELECT, "=r,r,r", [word, byte], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def unbias_e4m3(pair, DTYPE: tl.constexpr):
    """Two E4M3 magnitudes as a pair of DTYPE in int32, from their codes in the low bits of DTYPE's exponent."""
    ASM: tl.constexpr = UNBIAS_BF16 if DTYPE == tl.bfloat16 else UNBIAS_FP16
    return tl.inline_asm_elementwise(ASM, "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def halves_to_fp16(pair):
    """A pair of bf16 numbers -> the pair of the nearest fp16 numbers, both in int32."""
    return tl.inline_asm_elementwise(HALVES_TO_FP16, "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def lookup_words(words, books, halves, DTYPE: tl.constexpr):
    """Entries of the codes 0..7 of each word as eight tensors of DTYPE; `halves` as from `select_halves`."""
    TYPES: tl.constexpr = BF16 if DTYPE == tl.bfloat16 else FP16
    return tl.inline_asm_elementwise(
        LOOKUP, LOOKUP_CONSTRAINTS, [words, books, halves], dtype=TYPES, is_pure=True, pack=1
    )


@triton.jit
def lookup_scaled_words(words, books, halves, pair, high, DTYPE: tl.constexpr):
    """Like `lookup_words`, times the low (high = 0) or high (1) number of `pair`, rounded once to DTYPE."""
    TYPES: tl.constexpr = BF16 if DTYPE == tl.bfloat16 else FP16
    ASM: tl.constexpr = LOOKUP_BF16 if DTYPE == tl.bfloat16 else LOOKUP_FP16
    return tl.inline_asm_elementwise(
        ASM, SCALED_CONSTRAINTS, [words, books, halves, pair, high], dtype=TYPES, is_pure=True, pack=1
    )
