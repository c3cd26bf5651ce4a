"""The PTX machine of `ptx.py` against facts that need no GPU, and the lookups' text against plain indexing."""

from __future__ import annotations

import importlib.util

import numpy as np
import ptx
import pytest
import torch

WARPS = 3


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape or (32 * WARPS,), dtype=np.uint32)


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_prmt_takes_bytes_and_replicates_signs():
    one = lambda x: np.array([x], np.uint32)  # noqa: E731
    assert ptx.prmt(one(0x33221100), one(0x77665544), one(0x7531))[0] == 0x77553311
    assert ptx.prmt(one(0x33228100), one(0x77665544), one(0x0098))[0] == 0x0000FF00
    assert ptx.prmt(one(0x80FF7F00), one(0), one(0xBA98))[0] == 0xFFFF0000


@pytest.mark.parametrize(
    ("table", "function"),
    [(0xEA, lambda a, b, c: (a & b) | c), (0x96, lambda a, b, c: a ^ b ^ c), (0x80, lambda a, b, c: a & b & c)],
)
def test_lop3_follows_its_table(rng, table, function):
    a, b, c = words(rng), words(rng), words(rng)
    assert np.array_equal(ptx.lop3(a, b, c, np.full_like(a, table)), function(a, b, c))


def test_shuffle_stays_inside_its_warp_and_ignores_high_bits(rng):
    a, lane = words(rng), words(rng)
    expected = [a[i // 32 * 32 + lane[i] % 32] for i in range(len(a))]
    assert np.array_equal(ptx.shuffle(a, lane), np.array(expected))


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_round_as_torch_rounds(rng, kind, dtype):
    a, b = (torch.from_numpy(words(rng, 4096).view(np.int32)).view(dtype) for _ in range(2))
    expected = (a.double() * b.double()).to(dtype)
    bits = [t.view(torch.int32).numpy().view(np.uint32) for t in (a, b)]
    result = torch.from_numpy(ptx.multiply(*bits, np.uint32(ptx.MINUS_ZEROS), kind).view(np.int32)).view(dtype)
    finite = ~expected.isnan()
    assert torch.equal(result[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert result[~finite].isnan().all()


def test_unknown_instructions_and_registers_are_errors():
    with pytest.raises(KeyError):
        ptx.run("{ mul.lo.u32 $0, $1, $1; }", [np.zeros(32)], 1)
    with pytest.raises(KeyError):
        ptx.run("{ shr.u32 $0, r1, 1; }", [np.zeros(32)], 1)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_lookup_text(rng):
    """Every lane, code and choice of book: the shuffles and the PRMT fetch codebooks[choice, code]."""
    from aaac_ao.kernels import assembly

    books = rng.integers(0, 2**16, (2, 16), dtype=np.uint32)
    register = np.tile(books[0] | books[1] << 16, 2 * WARPS)
    word, chosen = words(rng), rng.integers(0, 2, 32 * WARPS)
    halves = np.where(chosen, 0x7632, 0x5410)
    values = ptx.run(assembly.LOOKUP.value, [word, register, halves], 8)
    for v, value in enumerate(values):
        assert np.array_equal(value, books[chosen, (word >> np.uint32(4 * v)) & np.uint32(15)])


@needs_triton
@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("FP16", torch.float16)])
def test_scaled_lookup_text(rng, kind, dtype):
    from aaac_ao.kernels import assembly

    books = torch.randn(2, 16).to(dtype)
    bits = books.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    register = np.tile(bits[0] | bits[1] << 16, 2 * WARPS)
    # the sign of an fp16 factor is that of a scale, which is not part of the weight; bf16 ones come without
    factors = (torch.randn(32 * WARPS, 2) if kind == "FP16" else torch.rand(32 * WARPS, 2)).to(dtype)
    pair = factors.view(torch.int32)[:, 0].numpy().view(np.uint32)
    word, chosen, half = words(rng), rng.integers(0, 2, 32 * WARPS), rng.integers(0, 2, 32 * WARPS)
    inputs = [word, register, np.where(chosen, 0x7632, 0x5410), pair, half]
    values = ptx.run(getattr(assembly, f"LOOKUP_{kind}").value, inputs, 8)
    for v, value in enumerate(values):
        entry = books[
            torch.from_numpy(chosen), torch.from_numpy((word >> np.uint32(4 * v) & np.uint32(15)).astype(int))
        ]
        expected = (entry.double() * factors[torch.arange(32 * WARPS), torch.from_numpy(half)].double().abs()).to(dtype)
        assert np.array_equal(value, expected.view(torch.int16).numpy().view(np.uint16))


@needs_triton
@pytest.mark.parametrize(
    ("kind", "dtype", "shift"), [("BF16", torch.bfloat16, 4), ("FP16", torch.float16, 7)], ids=["bf16", "fp16"]
)
def test_e4m3_text_decodes_every_code(kind, dtype, shift):
    from aaac_ao.kernels import assembly

    codes = np.arange(127, dtype=np.uint32)  # 127 is NaN
    (pair,) = ptx.run(getattr(assembly, f"UNBIAS_{kind}").value, [(codes | (126 - codes) << 16) << shift], 1)
    low = torch.from_numpy((pair & np.uint32(0xFFFF)).astype(np.uint16).view(np.int16)).view(dtype)
    expected = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(low.float(), expected.float())
    high = torch.from_numpy((pair >> np.uint32(16)).astype(np.uint16).view(np.int16)).view(dtype)
    assert torch.equal(high.float(), expected.float().flip(0))


@needs_triton
def test_scales_convert_to_fp16(rng):
    from aaac_ao.kernels import assembly

    pair = words(rng, 4096)
    (converted,) = ptx.run(assembly.HALVES_TO_FP16.value, [pair], 1)
    as_tensor = lambda x, dtype: torch.from_numpy(x.view(np.int32)).view(dtype)  # noqa: E731
    expected = as_tensor(pair, torch.bfloat16).half()
    assert torch.equal(as_tensor(converted, torch.half).nan_to_num(), expected.nan_to_num())


@needs_triton
def test_select_text_reads_sign_bits(rng):
    from aaac_ao.kernels import assembly

    word, byte = words(rng), rng.integers(0, 4, 32 * WARPS)
    (halves,) = ptx.run(assembly.SELECT.value, [word, (8 + byte) * 0x1111], 1)
    negative = (word >> (8 * byte + 7).astype(np.uint32)) & np.uint32(1)
    assert np.array_equal(halves & np.uint32(0xFFFF), np.where(negative, 0x7632, 0x5410))


@needs_triton
def test_table_lookup_text(rng):
    """Every byte of codes, lane and choice of book: the address is that of the pair, in the bank of the lane."""
    from aaac_ao.kernels import assembly

    books = rng.integers(0, 2**16, (2, 16), dtype=np.uint32)
    byte = np.arange(256)
    pairs = books[:, byte & 15] | books[:, byte >> 4] << np.uint32(16)  # [book, byte]
    table = np.repeat(pairs.T[:, :, None], 32, axis=2).reshape(-1)
    word, chosen = words(rng), rng.integers(0, 2, 32 * WARPS).astype(np.uint32)
    low = chosen << np.uint32(7) | (np.arange(32 * WARPS, dtype=np.uint32) & np.uint32(31)) << np.uint32(2)
    for byte in (0, 2):  # where the low byte of the address is
        both = low << np.uint32(8 * byte) | np.uint32(0x55 << (16 - 8 * byte))
        values = ptx.run(assembly.TABLE_LOOKUP.value, [word, both, np.full_like(word, byte)], 8, table)
        for v, value in enumerate(values):
            assert np.array_equal(value, books[chosen, (word >> np.uint32(4 * v)) & np.uint32(15)])
    other_lanes = np.arange(table.size) % 32 != 5  # lane 5 reads its own copy only
    only_other = np.where(other_lanes, np.uint32(0), table)
    values = ptx.run(assembly.TABLE_LOOKUP.value, [word, low, np.zeros_like(word)], 8, only_other)
    assert np.array_equal(values[3][5::32], books[chosen, (word >> np.uint32(12)) & np.uint32(15)][5::32])
    assert not np.delete(values[3].reshape(WARPS, 32), 5, axis=1).any()


@needs_triton
@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("FP16", torch.float16)])
def test_scaled_table_lookup_text(rng, kind, dtype):
    """The byte that gives the address also chooses the factor: low half or high half."""
    from aaac_ao.kernels import assembly

    entries, factors = torch.randn(256, 2).to(dtype), torch.rand(32 * WARPS, 2).to(dtype)
    table = np.repeat(entries.view(torch.int32).numpy().view(np.uint32), 64, axis=1).reshape(-1)
    word, byte = words(rng), rng.choice(np.array([0, 2], np.uint32), 32 * WARPS)
    pair = factors.view(torch.int32)[:, 0].numpy().view(np.uint32)
    text = getattr(assembly, f"TABLE_LOOKUP_{kind}").value
    values = ptx.run(text, [word, np.zeros_like(word), byte, pair], 8, table)
    factor = factors[torch.arange(32 * WARPS), torch.from_numpy(byte // 2).long()].double()
    for v, value in enumerate(values):
        code_byte = torch.from_numpy((word >> np.uint32(v // 2 * 8) & np.uint32(255)).astype(int))
        expected = (entries[code_byte, v % 2].double() * factor).to(dtype)
        assert np.array_equal(value, expected.view(torch.int16).numpy().view(np.uint16))
