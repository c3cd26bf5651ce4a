"""The tile layout of `qdata` against its formula, position by position."""

import pytest
import torch

from aaac_ao.packing import bytes_of_rows, natural_bytes, pack, packed_shape, unpack

SHAPES = [(1, 1), (1, 63), (16, 64), (17, 65), (15, 128), (33, 200), (48, 1), (5, 190)]


def random_codes(n: int, k: int) -> torch.Tensor:
    return torch.randint(16, (n, k), dtype=torch.uint8)


def stored_at(row: int, column: int) -> tuple[int, int, int]:
    """(row of qdata, byte in that row, shift of the nibble), from the text of the layout."""
    r, q = row % 16, column % 64
    g, h = r % 8, r // 8
    c, t, v = q // 32, q % 32 // 8, q % 8
    lane, word = 4 * g + t, 2 * c + h
    return row // 16, column // 64 * 512 + 16 * lane + 4 * word + v // 2, 4 * (v % 2)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_nibble_lies_where_the_layout_says(n, k):
    codes = random_codes(n, k)
    expected = [[0] * (-(-k // 64) * 512) for _ in range(-(-n // 16))]  # the filling is code 0
    for i in range(n):
        for j in range(k):
            tile_row, byte, shift = stored_at(i, j)
            expected[tile_row][byte] |= int(codes[i, j]) << shift
    assert pack(codes).tolist() == expected
    assert packed_shape(n, k) == (len(expected), len(expected[0]))


def test_the_formula_is_a_bijection_on_a_tile():
    assert len({stored_at(i, j) for i in range(16) for j in range(64)}) == 1024


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpack_inverts_pack(n, k):
    codes = random_codes(n, k)
    torch.testing.assert_close(unpack(pack(codes), n, k), codes, rtol=0, atol=0)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_natural_bytes_are_row_major_pairs(n, k):
    codes = random_codes(n, k)
    rows = natural_bytes(pack(codes))
    assert rows.shape == (-(-n // 16) * 16, -(-k // 64) * 32)
    for i, j in zip(torch.randint(n, (64,)).tolist(), torch.randint(k, (64,)).tolist(), strict=True):
        assert int(rows[i, j // 2]) >> 4 * (j % 2) & 15 == int(codes[i, j]), (i, j)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_bytes_of_rows_gathers_natural_bytes(n, k):
    """Repeated, unsorted and filling rows; and no row at all."""
    qdata = pack(random_codes(n, k))
    rows = torch.randint(-(-n // 16) * 16, (23,))
    torch.testing.assert_close(bytes_of_rows(qdata, rows), natural_bytes(qdata)[rows], rtol=0, atol=0)
    assert bytes_of_rows(qdata, rows[:0]).shape == (0, -(-k // 64) * 32)


@pytest.mark.parametrize("rows", [slice(0, 16), slice(16, 48), slice(32, 53)])
@pytest.mark.parametrize("columns", [slice(0, 64), slice(64, 192), slice(128, 230)])
def test_slices_of_whole_tiles_are_views(rows, columns):
    codes = random_codes(53, 230)
    qdata = pack(codes)
    tiles = (
        slice(rows.start // 16, -(-rows.stop // 16)),
        slice(columns.start // 64 * 512, -(-columns.stop // 64) * 512),
    )
    view, part = qdata[tiles], codes[rows, columns]
    assert view.untyped_storage().data_ptr() == qdata.untyped_storage().data_ptr()
    torch.testing.assert_close(view, pack(part), rtol=0, atol=0)
    torch.testing.assert_close(unpack(view, *part.shape), part, rtol=0, atol=0)
    torch.testing.assert_close(natural_bytes(view), natural_bytes(pack(part)), rtol=0, atol=0)
    row = torch.tensor([len(part) - 1, 0])
    torch.testing.assert_close(bytes_of_rows(view, row), natural_bytes(pack(part))[row], rtol=0, atol=0)


@pytest.mark.parametrize(("n", "k"), [(16, 64), (20, 70)])
def test_pack_takes_codes_of_any_strides(n, k):
    transposed, stepped = random_codes(k, n).t(), random_codes(n, 2 * k)[:, ::2]
    for codes in (transposed, stepped):
        torch.testing.assert_close(unpack(pack(codes), n, k), codes.contiguous(), rtol=0, atol=0)


@pytest.mark.parametrize("codes", [torch.zeros(64, dtype=torch.uint8), torch.zeros(1, 16, 64, dtype=torch.uint8)])
def test_pack_rejects_other_dimensions(codes):
    with pytest.raises(ValueError, match=f"{codes.dim()}-D"):
        pack(codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_pack_rejects_other_dtypes(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        pack(torch.zeros(16, 64, dtype=dtype))


@pytest.mark.parametrize(("n", "k"), [(17, 64), (16, 65), (32, 64)])
def test_unpack_rejects_other_shapes(n, k):
    with pytest.raises(ValueError, match=rf"\[{n}, {k}\].*\[1, 512\]"):
        unpack(torch.zeros(1, 512, dtype=torch.uint8), n, k)


def test_unpack_rejects_other_dtypes():
    with pytest.raises(ValueError, match=r"torch\.int8"):
        unpack(torch.zeros(1, 512, dtype=torch.int8), 16, 64)


def test_codes_above_15_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.15, got 16"):
        pack(torch.full((3, 5), 16, dtype=torch.uint8))
