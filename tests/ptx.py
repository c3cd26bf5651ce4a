"""A small PTX machine: runs the kernels' inline assembly, as its text stands, for all lanes of a warp at once.

Registers are numpy arrays of uint32. The first axis of an operand counts lanes, 32 to a warp; along the others a lane
holds several elements, for each of which the assembly runs once. Only the instructions that the kernels use exist here,
each written from its definition in NVIDIA's PTX ISA; any other is an error.
"""

from __future__ import annotations

import re

import numpy as np

MINUS_ZEROS = 0x80008000


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes out of the eight of b:a; bit 3 of a selector nibble replicates the byte's sign instead."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint64)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (source >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bitwise function of three inputs: bit 4 a + 2 b + c of `table`."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        match = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        result |= np.where(table >> np.uint32(row) & np.uint32(1), match, np.uint32(0))
    return result


def shuffle(a: np.ndarray, lane: np.ndarray) -> np.ndarray:
    """shfl.sync.idx with clamp 31: the value of `a` in lane `lane & 31` of the same warp."""
    a, lane = np.broadcast_arrays(a, lane)
    source = (np.arange(len(a)) & ~31).reshape(-1, *[1] * (a.ndim - 1)) + (lane & np.uint32(31))
    return np.take_along_axis(a, source.astype(np.int64), axis=0)


def round_half(value: np.ndarray, kind: str) -> np.ndarray:
    """Float64 -> the bits of the nearest bf16 or fp16 (ties to even, subnormals kept, overflow to infinity)."""
    bits, smallest, largest = (7, -126, 2.0**128) if kind == "bf16" else (10, -14, 2.0**16)
    exponent = np.maximum(np.frexp(value)[1] - 1, smallest)
    unit = np.ldexp(1.0, exponent - bits)
    value = np.rint(value / unit) * unit
    value = np.where(np.abs(value) >= largest, np.copysign(np.inf, value), value)
    if kind == "bf16":
        return value.astype(np.float32).view(np.uint32) >> np.uint32(16)
    return value.astype(np.float16).view(np.uint16).astype(np.uint32)


def from_half(bits: np.ndarray, kind: str) -> np.ndarray:
    """The low 16 bits as bf16 or fp16 -> float64."""
    if kind == "bf16":
        return (bits << np.uint32(16)).view(np.float32).astype(np.float64)
    return (bits & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float64)


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> np.ndarray:
    """fma.rn on pairs, for c = -0.0 only: a product that is rounded once and keeps its sign when it is zero."""
    assert np.all(c == MINUS_ZEROS), "the kernels use fma as a product"
    result = np.uint32(0)
    with np.errstate(invalid="ignore", over="ignore"):
        for shift in (np.uint32(0), np.uint32(16)):
            product = from_half((a >> shift) & np.uint32(0xFFFF), kind) * from_half(
                (b >> shift) & np.uint32(0xFFFF), kind
            )
            result = result | round_half(product, kind) << shift
    return result


def to_fp16_pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """cvt.rn.f16x2.f32: two fp32 numbers to a pair of fp16, the first to the high half."""
    with np.errstate(invalid="ignore", over="ignore"):
        high, low = (round_half(x.view(np.float32).astype(np.float64), "fp16") for x in (high, low))
    return high << np.uint32(16) | low


INSTRUCTIONS = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "setp.eq.u32": lambda a, b: (a == b).astype(np.uint32),
    "selp.b16": lambda a, b, p: np.where(p, a, b),
    "abs.f16x2": lambda a: a & np.uint32(0x7FFF7FFF),
    "cvt.rn.f16x2.f32": to_fp16_pair,
    "fma.rn.bf16x2": lambda a, b, c: multiply(a, b, c, "bf16"),
    "fma.rn.f16x2": lambda a, b, c: multiply(a, b, c, "fp16"),
}


def run(asm: str, inputs: list[np.ndarray], outputs: int, shared: np.ndarray | None = None) -> list[np.ndarray]:
    """Run `asm` with $outputs, $outputs+1, ... = inputs; returns $0 .. $outputs-1 (16-bit ones in the low half).

    `shared` is shared memory as uint32 words, behind the symbol `global_smem`, which stands at a base of its own.

    Raises:
        KeyError: an instruction that is not in `INSTRUCTIONS`, or a register that was never written.
    """
    inputs = np.broadcast_arrays(*(np.asarray(x).astype(np.uint32) for x in inputs))
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    lanes = (np.arange(len(inputs[0]), dtype=np.uint32) & np.uint32(31)).reshape(-1, *[1] * (inputs[0].ndim - 1))
    registers["%laneid"] = np.broadcast_to(lanes, inputs[0].shape)
    registers["global_smem"] = np.full(inputs[0].shape, 0x400, np.uint32)  # where sm_90 has it

    def value(operand: str) -> np.ndarray:
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return np.full(inputs[0].shape, int(operand, 0) & 0xFFFFFFFF, np.uint32)
        return registers[operand]

    body = re.sub(r"//[^\n]*", "", asm).strip()
    body = body[1:-1] if body.startswith("{") else body
    for statement in filter(None, (line.strip() for line in body.split(";"))):
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            continue
        target, *operands = (part.strip() for part in re.split(r",(?![^{]*\})", rest))
        if name in ("mov.b32", "mov.u32"):
            if target.startswith("{"):
                low, high = (part.strip() for part in target[1:-1].split(","))
                registers[low] = value(operands[0]) & np.uint32(0xFFFF)
                registers[high] = value(operands[0]) >> np.uint32(16)
            elif operands[0].startswith("{"):
                low, high = (value(part.strip()) for part in operands[0][1:-1].split(","))
                registers[target] = low | high << np.uint32(16)
            else:
                registers[target] = value(operands[0])
        elif name == "shfl.sync.idx.b32":
            assert operands[2:] == ["31", "-1"], "all lanes take part"
            registers[target] = shuffle(value(operands[0]), value(operands[1]))
        elif name == "ld.shared.b32":
            address = value(operands[0].strip("[]")) - registers["global_smem"]
            assert np.all(address % 4 == 0)
            registers[target] = shared[address // 4]
        else:
            registers[target] = INSTRUCTIONS[name](*map(value, operands))
    return [registers[f"${i}"] for i in range(outputs)]


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack, shared=None):
    """Stands in for `tl.inline_asm_elementwise` in Triton's interpreter; first axes of operands count lanes."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    assert pack == 1
    constraints, several = str(getattr(constraints, "value", constraints)).split(","), getattr(dtype, "value", dtype)
    types = tuple(several) if isinstance(several, tuple | tl.tuple) else (several,)
    inputs = [a.handle.data if isinstance(a, tl.tensor) else np.asarray(getattr(a, "value", a)) for a in args]
    assert constraints == ["=h" if t.primitive_bitwidth == 16 else "=r" for t in types] + ["r"] * len(args)
    inputs = [x.astype(np.int64) & 0xFFFFFFFF for x in inputs]
    results = []
    for bits, kind in zip(run(str(getattr(asm, "value", asm)), inputs, len(types), shared), types, strict=True):
        if kind == tl.int32:
            data = bits.view(np.int32)
        else:
            data = bits.astype(np.uint16) if kind == tl.bfloat16 else bits.astype(np.uint16).view(np.float16)
        results.append(tl.tensor(TensorHandle(np.ascontiguousarray(data), kind), tl.block_type(kind, list(data.shape))))
    return tuple(results) if isinstance(several, tuple | tl.tuple) else results[0]
