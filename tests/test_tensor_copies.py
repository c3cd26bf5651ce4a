"""Copies, casts and moves of `AAACTensor`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tensor_oracle import (
    DTYPES,
    assert_rounded,
    dense,
    sample,
    saved,
)
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor

# copies


@pytest.mark.parametrize("move", [lambda w, d: w.to(d), lambda w, d: w.to(dtype=d), lambda w, d: w.to("cpu", d)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_dtype(kind, move, dtype):
    for start in DTYPES:
        w = sample(37, 172, *kind).tensor(start)
        moved = move(w, dtype)
        assert moved.dtype == dtype
        assert moved.dequantize().dtype == dtype
        assert moved.equal(w)
        assert moved.scale.dtype == w.scale.dtype
        x = torch.randn(2, 172, dtype=dtype)
        assert torch.equal(F.linear(x, moved), F.linear(x, w))


def test_to_refuses_other_dtypes():
    w = sample(16, 64).tensor()
    for move in (lambda: w.to(torch.int32), lambda: w.int(), lambda: w.double(), lambda: w.to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match="presents float32, bfloat16 or float16, not"):
            move()


@pytest.mark.parametrize(
    "copied",
    [
        lambda w: w.clone(),
        lambda w: copy.deepcopy(w),
        lambda w: copy.deepcopy(nn.Parameter(w, requires_grad=False)),
        lambda w: w.to(torch.float16),
        lambda w: w.to("cpu", copy=True),
        lambda w: saved(w),
    ],
)
def test_copies_are_independent(kind, copied):
    w = sample(37, 172, *kind).tensor(act_pre_scale=torch.rand(172))
    other = copied(w)
    assert other.equal(w)
    assert torch.equal(other.dequantize(torch.float32), dense(w))
    before = dense(w)
    other.copy_(sample(37, 172, *kind).tensor(act_pre_scale=torch.rand(172)))
    assert torch.equal(dense(w), before)
    assert not torch.equal(dense(other), before)
    assert not torch.equal(other.act_pre_scale, w.act_pre_scale)


def test_detach_is_a_view(kind):
    w = sample(37, 172, *kind).tensor()
    source = sample(37, 172, *kind).tensor()
    w.detach().copy_(source)
    assert w.equal(source)


def test_copy(kind):
    a, b = sample(37, 172, *kind).tensor(), sample(37, 172, *kind).tensor(torch.bfloat16)
    assert a.copy_(b) is a
    assert a.equal(b)
    assert a.dtype == torch.float32


def test_copy_errors(kind):
    w = sample(37, 172, *kind).tensor()
    other = ("nvfp4", 16) if kind[0] == "int4" else ("int4", 64)
    for source in (
        sample(37, 171, *kind).tensor(),
        sample(36, 172, *kind).tensor(),
        sample(37, 172, *other).tensor(),
        sample(172, 37, *kind).tensor().t(),
        sample(37, 172, *kind).tensor(act_pre_scale=torch.ones(172)),
    ):
        before = dense(w)
        with pytest.raises(ValueError, match="cannot copy") as caught:
            w.copy_(source)
        assert len(str(caught.value)) < 300
        assert torch.equal(dense(w), before)
    for call in (lambda: w.copy_(torch.randn(37, 172)), lambda: torch.empty(37, 172).copy_(w)):
        with pytest.raises(TypeError, match="dequantize"):
            call()


@pytest.mark.parametrize("dim", [0, 1])
def test_loading_parts_into_a_fused_weight(kind, dim):
    """As vLLM loads q, k and v: an uninitialised weight, and every part copied into its place."""
    fmt, group_size = kind
    layer = nn.Linear(256, 96)
    quantize_(layer, AAACConfig(format=fmt, group_size=group_size, step="prepare_for_loading"))
    fused, size = layer.weight, 32 if dim == 0 else 64
    assert isinstance(fused, AAACTensor)
    assert bool(dense(fused).isnan().all()), "an unfilled weight must not look like a good one"
    shape = (size, 256) if dim == 0 else (96, size)
    parts = [sample(*shape, *kind) for _ in range(fused.shape[dim] // size)]
    for i, part in enumerate(parts):
        part.books, part.per_tensor_scale = parts[0].books.clone(), parts[0].per_tensor_scale
        fused.data.narrow(dim, i * size, size).copy_(part.tensor())
    assert_rounded(fused.dequantize(), torch.cat([part.dense() for part in parts], dim))
    before = fused.detach().clone()
    foreign = sample(*shape, *kind)
    for target in (fused.data.narrow(dim, 0, size), fused.data.narrow(dim, size, size).view(shape)):
        with pytest.raises(ValueError, match="shared codebooks") as caught:
            target.copy_(foreign.tensor())
        assert len(str(caught.value)) < 250
    with pytest.raises(ValueError, match="shared codebooks"):
        fused.data.narrow(dim, 0, size).t().copy_(foreign.tensor().t())
    assert fused.equal(before)
    cut = fused.data.narrow(dim, 0, size).clone()  # a copy owns its books
    cut.copy_(foreign.tensor())
    assert cut.equal(foreign.tensor())
    assert fused.equal(before)
    whole = sample(96, 256, *kind).tensor()  # and the whole weight may take new ones
    fused.data.copy_(whole)
    assert fused.equal(whole)


def test_empty_like(kind):
    w = sample(37, 172, *kind).tensor(torch.bfloat16, act_pre_scale=torch.ones(172))
    for like, device, dtype in (
        (torch.empty_like(w), "cpu", torch.bfloat16),
        (torch.empty_like(w, dtype=torch.float16), "cpu", torch.float16),
        (torch.empty_like(w, device="meta"), "meta", torch.bfloat16),
    ):
        assert isinstance(like, AAACTensor)
        assert (like.shape, like.device.type, like.dtype) == (w.shape, device, dtype)
    like = torch.empty_like(w)
    assert bool(like.codebooks.isnan().all())
    assert not w.codebooks.isnan().any()
    assert like.copy_(w).equal(w)


def test_equal(kind):
    a = sample(37, 172, *kind)
    w = a.tensor()
    assert w.equal(w.clone())
    assert torch.equal(w, a.tensor(torch.float16))
    changes = [
        lambda v: v.qdata.view(-1)[0].bitwise_xor_(1),
        lambda v: v.scale.view(torch.uint8)[0, 0].add_(1),
        lambda v: v.codebooks[1, 3].add_(1),
    ]
    if kind[0] == "nvfp4":
        changes.append(lambda v: v.per_tensor_scale.mul_(1.5))
    for change in changes:
        other = w.clone()
        change(other)
        assert not w.equal(other)
        assert not other.equal(w)
    assert not w.equal(w.t())
    assert not w.equal(dense(w))
    assert not w.equal(sample(37, 171, *kind).tensor())
    assert not w.equal(a.tensor(act_pre_scale=torch.ones(172)))
    assert a.tensor(act_pre_scale=torch.ones(172)).equal(a.tensor(act_pre_scale=torch.ones(172)))


def test_equal_tells_negative_zero_from_zero(kind):
    a = sample(16, 64, *kind)
    a.scale.fill_(0.0)
    w, other = a.tensor(), a.tensor()
    other.scale = other.scale.clone().fill_(-0.0)
    assert torch.equal(w.scale.float(), other.scale.float())
    assert not w.equal(other)
    books = a.tensor().clone()
    books.codebooks.zero_()
    negative = books.clone()
    negative.codebooks.neg_()
    assert not books.equal(negative)


def test_memory_placement(kind):
    w = sample(37, 172, *kind).tensor(act_pre_scale=torch.ones(172))
    assert not w.is_pinned()
    assert not w.is_shared() or w.qdata.is_shared()
    assert w.share_memory_() is w
    for name in ("qdata", "scale", "codebooks", "act_pre_scale"):
        assert getattr(w, name).is_shared()
    layer = nn.Linear(172, 37)
    layer.weight = nn.Parameter(w.clone(), requires_grad=False)
    layer.share_memory()
    assert layer.weight.qdata.is_shared()


def test_meta(kind):
    w = sample(37, 172, *kind).tensor(torch.bfloat16)
    m = w.to("meta")
    assert (m.device.type, m.dtype, m.shape, m.group_size) == ("meta", torch.bfloat16, w.shape, w.group_size)
    assert all(part.is_meta for part in (m.qdata, m.scale, m.codebooks))
    y = F.linear(torch.empty(2, 172, device="meta", dtype=torch.float16), m)
    assert (y.shape, y.dtype, y.device.type) == ((2, 37), torch.float16, "meta")
    assert torch.cat(m[:32].split(16)).shape == (32, 172)
    back = torch.empty_like(m, device="cpu").copy_(w)
    assert back.equal(w)
    with pytest.raises(ValueError, match="meta"):
        F.linear(torch.randn(2, 172), m)


def test_pickle(kind):
    w = sample(37, 172, *kind).tensor(torch.bfloat16, act_pre_scale=torch.rand(172))
    for v in (w, w.t(), nn.Parameter(w, requires_grad=False)):
        # torch cannot read a plain pickle of any float8 tensor ("UntypedStorage has no attribute dtype")
        copies = [saved(v)] + ([pickle.loads(pickle.dumps(v))] if kind[0] == "int4" else [])
        for again in copies:
            assert type(again) is type(v)
            assert (again.dtype, again.transposed, again.shape) == (v.dtype, v.transposed, v.shape)
            assert again.equal(v)
