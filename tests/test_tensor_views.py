"""Views and rows of `AAACTensor` against those of dense tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensor_oracle import (
    assert_rounded,
    dense,
    sample,
)
from torch import nn

from aaac_ao import AAACTensor

pytestmark = pytest.mark.usefixtures("exact")

# views


def test_transposes(kind):
    w = sample(37, 172, *kind).tensor()
    for back in (w.t().t(), w.transpose(0, 0), w.t().transpose(-1, 0), w.permute(0, 1), w.T.T):
        assert back.equal(w)
        assert back.qdata.data_ptr() == w.qdata.data_ptr()
    assert not w.t().equal(w)
    with pytest.raises(IndexError):
        w.transpose(0, 2)
    with pytest.raises((ValueError, RuntimeError)):
        w.permute(0, 0)


SLICES = [
    (0, slice(16, 48)),
    (0, slice(None, 32)),
    (0, slice(32, None)),
    (0, slice(-68, -52)),
    (0, slice(96, 100)),
    (0, slice(96, 1000)),
    (0, slice(-1000, 16)),
    (0, slice(None)),
    (1, slice(64, 128)),
    (1, slice(128, None)),
    (1, slice(None, -66)),
    (1, slice(-130, 64)),
    (1, slice(192, 194)),
]


@pytest.mark.parametrize(("dim", "part"), SLICES)
def test_slice(kind, dim, part):
    w = sample(100, 194 if dim else 130, *kind).tensor()
    if dim and part.start == -130:
        part = slice(-130, -66)
    index = (part,) if dim == 0 else (slice(None), part)
    turned = tuple(reversed((*index, slice(None))[:2]))
    cut = w[index]
    assert isinstance(cut, AAACTensor)
    assert torch.equal(dense(cut), dense(w)[index])
    assert torch.equal(dense(w.t()[turned]), dense(w).t()[turned])
    assert torch.equal(dense(w[index].t()), dense(w)[index].t())
    x = torch.randn(3, cut.shape[1])
    torch.testing.assert_close(F.linear(x, cut), x @ dense(w)[index].t(), rtol=1e-4, atol=1e-3)
    first = part.indices(w.shape[dim])[0]
    row, column = (first, 0) if dim == 0 else (0, first)
    offset = row // 16 * w.qdata.stride(0) + column // 64 * 512
    assert cut.qdata.data_ptr() == w.qdata.data_ptr() + offset
    groups = row * w.scale.stride(0) + column // w.group_size
    assert cut.scale.data_ptr() == w.scale.data_ptr() + groups * w.scale.element_size()
    assert cut.codebooks.data_ptr() == w.codebooks.data_ptr()


def test_narrow_and_slices_of_slices(kind):
    w = sample(100, 300, *kind).tensor()
    d = dense(w)
    assert torch.equal(dense(w.narrow(0, 32, 48).narrow(0, 16, 32)), d[48:80])
    assert torch.equal(dense(w.narrow(1, 64, 192).narrow(-1, 64, 64)), d[:, 128:192])
    assert torch.equal(dense(w[32:][:, 64:][16:48, 64:]), d[48:80, 128:])
    assert torch.equal(dense(w.t()[64:, 16:][64:].t()), d[16:, 128:])
    assert torch.equal(dense(w.t().narrow(1, 96, 4)), d[96:].t())


@pytest.mark.parametrize(("dim", "start", "length"), [(0, 16, 32), (1, 64, 128), (1, 256, 44), (0, 96, 4)])
def test_writing_through_a_view(kind, dim, start, length):
    a, b = sample(100, 300, *kind), sample(100, 300, *kind)
    b.books, b.per_tensor_scale = a.books, a.per_tensor_scale
    wa, wb = a.tensor(), b.tensor()
    expected = dense(wa).clone()
    expected.narrow(dim, start, length).copy_(dense(wb).narrow(dim, start, length))
    for way in ("plain", "data", "transposed"):
        w = wa.clone()
        target, source = w.narrow(dim, start, length), wb.narrow(dim, start, length)
        if way == "data":
            target = nn.Parameter(w, requires_grad=False).data.narrow(dim, start, length)
        if way == "transposed":
            target, source = w.t().narrow(1 - dim, start, length), wb.t().narrow(1 - dim, start, length)
        target.copy_(source)
        assert torch.equal(dense(w), expected), way
        assert not torch.equal(dense(wa), expected)


@pytest.mark.parametrize(
    ("group_size", "index", "unit"),
    [
        (64, (slice(8, 32),), "multiples of 16"),
        (64, (slice(0, 90),), "multiples of 16"),
        (64, (slice(None), slice(16, None)), "multiples of 64"),
        (32, (slice(None), slice(0, 32)), "multiples of 64"),
        (128, (slice(None), slice(64, 128)), "multiples of 128"),
        (128, (slice(None), slice(0, 192)), "multiples of 128"),
    ],
)
def test_misaligned_slices_name_the_unit(group_size, index, unit):
    w = sample(100, 300, group_size=group_size).tensor()
    with pytest.raises(ValueError, match=unit) as caught:
        w[index]
    assert "dequantize" in str(caught.value)
    assert len(str(caught.value)) < 200


def test_other_slices_are_refused():
    w = sample(100, 300).tensor()
    with pytest.raises(ValueError, match="step 1, got 2"):
        w[::2]
    with pytest.raises(ValueError, match="empty slice"):
        w[32:32]


def test_view(kind):
    w = sample(37, 172, *kind).tensor()
    for same in (w.view(37, 172), w.view(-1, 172), w.view(37, -1), w.view_as(w), w.reshape(37, 172)):
        assert same.equal(w)
        assert same.qdata.data_ptr() == w.qdata.data_ptr()
    for shape in ((172, 37), (37 * 172,), (1, 37, 172)):
        with pytest.raises(ValueError, match="cannot be viewed as"):
            w.view(shape)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_split_chunk_and_cat(kind, dim):
    w = sample(100, 300, *kind).tensor()
    d, last = dense(w), w.shape[dim] - 64
    for turned in (False, True):
        v, e = (w.t(), d.t()) if turned else (w, d)
        at = dim if not turned else {0: 1, 1: 0, -1: -2, -2: -1}[dim]
        for pieces, expected in (
            (v.split(64, at), e.split(64, at)),
            (v.split(64, dim=at), e.split(64, at)),
            (v.split([64, last], at), e.split([64, last], at)),
            (torch.split_with_sizes(v, [64, last], dim=at), e.split([64, last], at)),
            (v.tensor_split([64], at), e.tensor_split([64], at)),
        ):
            assert [tuple(p.shape) for p in pieces] == [tuple(p.shape) for p in expected]
            assert all(torch.equal(dense(p), q) for p, q in zip(pieces, expected, strict=True))
            for joined in (torch.cat(list(pieces), at), torch.cat(list(pieces), dim=at)):
                assert joined.equal(v)
                assert torch.equal(dense(joined), e)
    with pytest.raises((ValueError, RuntimeError)):
        w.split([64, last - 1], dim)


def test_even_chunks(kind):
    w = sample(96, 256, *kind).tensor()
    for dim in (0, 1):
        for pieces in (w.chunk(2, dim), w.tensor_split(2, dim)):
            assert [p.shape[dim] for p in pieces] == [w.shape[dim] // 2] * 2
            assert pieces[1].codebooks.data_ptr() == w.codebooks.data_ptr()
            assert torch.cat(pieces, dim).equal(w)


def test_cat_of_different_weights_with_equal_books(kind):
    a, b = sample(32, 172, *kind), sample(37, 172, *kind)
    b.books, b.per_tensor_scale = a.books.clone(), a.per_tensor_scale
    joined = torch.cat([a.tensor(), b.tensor()])
    assert joined.shape == (69, 172)
    assert_rounded(joined.dequantize(), torch.cat([a.dense(), b.dense()]))
    c, d = sample(37, 128, *kind), sample(37, 44, *kind)
    d.books, d.per_tensor_scale = c.books.clone(), c.per_tensor_scale
    assert_rounded(torch.cat([c.tensor(), d.tensor()], 1).dequantize(), torch.cat([c.dense(), d.dense()], 1))


def test_cat_errors(kind):
    fmt = kind[0]
    a = sample(32, 192, *kind)
    same_books = sample(32, 192, *kind)
    same_books.books, same_books.per_tensor_scale = a.books, a.per_tensor_scale
    w, other = a.tensor(), same_books.tensor()
    foreign = sample(32, 192, *kind)
    foreign.per_tensor_scale = a.per_tensor_scale
    cases = [
        ([w, foreign.tensor()], 0, ValueError, "different codebooks"),
        ([w, foreign.tensor()], 1, ValueError, "different codebooks"),
        ([w, torch.randn(32, 192)], 0, TypeError, "plain tensor"),
        ([torch.randn(32, 192), w], 0, TypeError, "plain tensor"),
        ([w, other[:, :128]], 0, ValueError, "cannot cat"),
        ([w, other[:16]], 1, ValueError, "cannot cat"),
        ([w, other.t()], 0, ValueError, "cannot cat"),
        ([w, other.half()], 0, ValueError, "cannot cat"),
        ([w, a.tensor(act_pre_scale=torch.ones(192))], 0, ValueError, "different codebooks or scales"),
        ([w, a.tensor(act_pre_scale=torch.ones(192))], 1, ValueError, "different codebooks or scales"),
        ([a.tensor(act_pre_scale=torch.full((192,), v)) for v in (1.0, 2.0)], 0, ValueError, "or scales"),
    ]
    if fmt == "nvfp4":
        scaled = sample(32, 192, *kind)
        scaled.books = a.books
        cases.append(([w, scaled.tensor()], 0, ValueError, "different codebooks or scales"))
    else:
        cases.append(([w, sample(32, 192, "int4", 32).tensor()], 0, ValueError, "cannot cat"))
    for weights, dim, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            torch.cat(weights, dim)
        assert len(str(caught.value)) < 400
    ragged = sample(37, 172, *kind).tensor()
    for dim, unit in ((0, "16"), (1, "64")):
        with pytest.raises(ValueError, match=f"all but the last must be multiples of {unit}"):
            torch.cat([ragged, ragged], dim)


# rows


def test_rows(kind):
    w = sample(37, 172, *kind).tensor(torch.bfloat16)
    d = w.dequantize()
    mask = torch.rand(37) < 0.3
    for index in (
        torch.tensor([0, 36, -1, -37, 5, 5]),
        torch.tensor([[1, 2], [3, -4]]),
        torch.tensor(7),
        torch.tensor([3], dtype=torch.int32),
        mask,
        torch.zeros(37, dtype=torch.bool),
        torch.empty(0, dtype=torch.int64),
        torch.rand(37, 172) < 0.1,
        [1, -2],
        (torch.tensor([1, 2]), torch.tensor([3, -1])),
        (slice(None), torch.tensor([5, 171])),
        0,
        -1,
        (slice(None), 3),
        (4, 5),
    ):
        got = w[index]
        assert type(got) is torch.Tensor
        assert (got.dtype, got.shape) == (torch.bfloat16, d[index].shape), index
        assert torch.equal(got, d[index]), index
    for dim, at in ((0, -2), (1, 3), (-1, -1), (-2, 36)):
        assert torch.equal(w.select(dim, at), d.select(dim, at))
        assert torch.equal(w.t().select(1 - dim % 2, at), d.t().select(1 - dim % 2, at))
    for index in (torch.tensor([0, 5, 36]), torch.tensor(4), torch.empty(0, dtype=torch.int64)):
        assert torch.equal(w.index_select(0, index), d.index_select(0, index))
        assert torch.equal(w.index_select(-1, index), d.index_select(-1, index))


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w[37],
        lambda w: w[-38],
        lambda w: w[torch.tensor([0, 37])],
        lambda w: w[torch.tensor([-38])],
        lambda w: w[torch.ones(36, dtype=torch.bool)],
        lambda w: w[torch.ones(38, dtype=torch.bool)],
        lambda w: w.index_select(0, torch.tensor([37])),
        lambda w: w.index_select(0, torch.tensor([-1])),
        lambda w: F.embedding(torch.tensor([37]), w),
        lambda w: F.embedding(torch.tensor([-1]), w),
        lambda w: w.select(0, 37),
    ],
)
def test_rows_out_of_range(read):
    """What a dense tensor refuses is refused."""
    w = sample(37, 172).tensor()
    with pytest.raises((IndexError, RuntimeError)):
        read(dense(w))
    with pytest.raises(IndexError):
        read(w)


def test_embedding(kind):
    w = sample(37, 172, *kind).tensor(torch.float16)
    layer = nn.Embedding(37, 172, padding_idx=0)
    layer.weight = nn.Parameter(w, requires_grad=False)
    for index in (torch.randint(0, 37, (2, 5)), torch.tensor(3), torch.empty(2, 0, dtype=torch.int64)):
        expected = F.embedding(index, w.dequantize())
        assert torch.equal(layer(index), expected)
        with torch.inference_mode():
            assert torch.equal(layer(index), expected)
        with torch._C.DisableTorchFunctionSubclass():
            assert torch.equal(F.embedding(index, w), expected)


def test_rows_of_a_transposed_weight_are_refused():
    w = sample(37, 172).tensor().t()
    for read in (lambda: w[torch.tensor([1])], lambda: w.index_select(0, torch.tensor([1]))):
        with pytest.raises(ValueError, match="transposed"):
            read()
