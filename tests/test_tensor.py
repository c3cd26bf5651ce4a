"""`AAACTensor`: construction, products and models, against dense tensors."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from tensor_oracle import (
    DTYPES,
    KINDS,
    RAGGED,
    assert_product,
    assert_rounded,
    dense,
    of_tensor,
    sample,
)
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor

pytestmark = pytest.mark.usefixtures("exact")

# construction and reading


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "group_size"), KINDS)
@pytest.mark.parametrize(("n", "k"), [(37, 172), (1, 128), (100, 130)])
def test_from_hp(n, k, fmt, group_size, dtype):
    weight = torch.randn(n, k).to(dtype)
    w = AAACTensor.from_hp(weight, AAACConfig(format=fmt, group_size=group_size, iterations=3))
    assert (w.shape, w.dtype, w.device, w.stride()) == (weight.shape, dtype, weight.device, weight.stride())
    assert (w.format, w.group_size, w.in_features, w.out_features) == (fmt, group_size, k, n)
    assert_rounded(w.dequantize(), of_tensor(w).reshape(n, k))
    assert w.dequantize().dtype == dtype
    error = (w.dequantize(torch.float32) - weight.float()).square().mean() / weight.float().square().mean()
    assert error < 0.02, f"quantisation error {float(error):.4f}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), RAGGED)
def test_dequantize(n, k, kind, dtype):
    s = sample(n, k, *kind)
    w = s.tensor(torch.bfloat16)
    assert_rounded(w.dequantize(dtype), s.dense())
    assert_rounded(w.t().dequantize(dtype), s.dense().t())
    assert w.dequantize().dtype == torch.bfloat16


def test_numbers_are_exact(kind):
    s = sample(16, 64, *kind)
    w = s.tensor()
    assert torch.equal(torch.tensor(w.codebook_values, dtype=torch.float64), s.books.double())
    assert w.per_tensor_scale_value == (None if s.per_tensor_scale is None else float(s.per_tensor_scale))
    again = AAACTensor(w.qdata, w.scale, w.group_size, w.k_pad, w.dtype, w.codebook_values, w.per_tensor_scale_value)
    assert again.equal(w)


@pytest.mark.parametrize(("fmt", "group_size"), KINDS)
def test_stored_bytes(fmt, group_size):
    w = sample(1024, 2048, fmt, group_size).tensor(torch.bfloat16)
    parts = [w.qdata, w.scale, w.codebooks] + ([w.per_tensor_scale] if fmt == "nvfp4" else [])
    assert w.stored_bytes == sum(part.untyped_storage().nbytes() for part in parts)
    assert w.stored_bytes <= 4.6 / 16 * w.numel() * 2


def test_repr_is_short(kind):
    w = sample(100, 130, *kind).tensor(torch.bfloat16)
    expected = f"shape=[100, 130], format='{kind[0]}', group_size={kind[1]}, dtype=torch.bfloat16, device='cpu'"
    assert repr(w) == f"AAACTensor({expected})"
    assert "tensor(" not in repr(nn.Parameter(w, requires_grad=False))
    assert f"{kind[0]}" in repr(AAACTensor.empty((16, 64), AAACConfig(format=kind[0]), torch.float32, "meta"))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"qdata": p["qdata"].int()},
        lambda p: {"qdata": p["qdata"][:, :512]},
        lambda p: {"qdata": p["qdata"][:1]},
        lambda p: {"k_pad": 64},
        lambda p: {"group_size": p["group_size"] * 2},
        lambda p: {"scale": p["scale"].float()},
        lambda p: {"scale": p["scale"][:, :1]},
        lambda p: {"scale": p["scale"][:16]},
        lambda p: {"codebook_values": [[0.0] * 16]},
        lambda p: {"codebook_values": torch.zeros(16, 2)},
        lambda p: {"per_tensor_scale_value": 1.0 if p["per_tensor_scale_value"] is None else None},
    ],
)
def test_foreign_parts_are_refused(kind, change):
    s = sample(37, 172, *kind)
    names = ("qdata", "scale", "codebook_values", "per_tensor_scale_value")
    parts = {**dict(zip(names, s.parts, strict=True)), "group_size": kind[1], "k_pad": 20, "dtype": torch.float32}
    AAACTensor(**parts)
    with pytest.raises(ValueError, match="not an AAACTensor") as caught:
        AAACTensor(**{**parts, **change(parts)})
    assert len(str(caught.value)) < 300


# products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["function", "inference", "aten", "aten and inference", "no_grad", "keywords"])
def test_linear(kind, how, dtype):
    s = sample(37, 172, *kind)
    w, bias = s.tensor(), torch.randn(37, dtype=dtype)

    def check():
        for leading in ((), (3,), (2, 5), (0,)):
            x = torch.randn(*leading, 172, dtype=dtype)
            for b in (None, bias):
                y = F.linear(input=x, weight=w, bias=b) if how == "keywords" else F.linear(x, w, b)
                assert (type(y), y.dtype) == (torch.Tensor, dtype)
                # through aten with gradients on, the bias may be added after a first rounding
                if how == "aten" and b is not None and dtype != torch.float32:
                    torch.testing.assert_close(y.double(), x.double() @ s.dense().t() + b.double(), rtol=0.02, atol=0.5)
                else:
                    assert_product(y, x, s.dense(), b)

    inference, plain = torch.inference_mode("inference" in how), torch._C.DisableTorchFunctionSubclass
    with inference, torch.set_grad_enabled(how not in ("no_grad", "inference", "aten and inference")):
        if "aten" in how:
            with plain():
                check()
        else:
            check()


def test_linear_with_a_transposed_weight(kind):
    s = sample(37, 172, *kind)
    x = torch.randn(3, 37)
    assert_product(F.linear(x, s.tensor().t()), x, s.dense().t())
    assert_product(x @ s.tensor(), x, s.dense().t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_mm(kind, dtype):
    s = sample(37, 172, *kind)
    w, x = s.tensor(dtype), torch.randn(5, 172, dtype=dtype)
    for turned in (w.t(), w.T, w.mT, w.transpose(0, 1), w.transpose(-1, -2), w.permute(1, 0)):
        assert isinstance(turned, AAACTensor)
        assert turned.shape == (172, 37)
        assert turned.stride() == (1, 172)
        assert_product(torch.mm(x, turned), x, s.dense())
        assert_product(x @ turned, x, s.dense())
    assert_product((x.repeat(2, 1, 1) @ w.t())[1], x, s.dense())
    y = torch.randn(172, 5, dtype=dtype)
    rounded = w.dequantize().double()  # a weight on the left is made dense in the dtype of the other side
    assert_product(torch.mm(w, y).t(), y.t(), rounded)
    assert_product(torch.mm(w.t(), x[:, :37].t()[:37]).t(), x[:, :37], rounded.t())


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (2, 1), (1, 0.5), (-1.5, 3), (1, 0)])
def test_addmm(kind, alpha, beta):
    s = sample(37, 172, *kind)
    w, x = s.tensor(), torch.randn(5, 172)
    for bias in (torch.randn(37), torch.randn(5, 37), torch.randn(1), torch.randn(5, 1)):
        want = beta * bias.double() + alpha * (x.double() @ s.dense().t())
        torch.testing.assert_close(
            torch.addmm(bias, x, w.t(), alpha=alpha, beta=beta).double(), want, rtol=1e-4, atol=1e-3
        )
    for left, right in ((w, torch.randn(172, 4)), (w.t(), torch.randn(37, 4))):
        bias = torch.randn(4)
        want = torch.addmm(bias, dense(left), right, alpha=alpha, beta=beta)
        torch.testing.assert_close(torch.addmm(bias, left, right, alpha=alpha, beta=beta), want, rtol=1e-4, atol=1e-3)


def test_addmm_beta_zero_ignores_the_bias():
    w, x = sample(16, 64).tensor(), torch.randn(2, 64)
    y = torch.addmm(torch.full((16,), float("nan")), x, w.t(), beta=0)
    assert bool(y.isfinite().all())


def test_product_errors():
    w, x = sample(37, 172).tensor(), torch.randn(3, 172)
    with pytest.raises(ValueError, match="input has 171 features, the weight 172"):
        F.linear(x[:, 1:], w)
    with pytest.raises(TypeError, match="plain input"):
        F.linear(w, w)
    with pytest.raises(ValueError, match="bias must have shape"):
        F.linear(x, w, torch.randn(36))
    with pytest.raises(RuntimeError):
        torch.mm(x[:, 1:], w.t())


def test_gradient_reaches_the_input_through_a_module(kind):
    s = sample(37, 172, *kind)
    layer = nn.Linear(172, 37)
    layer.weight = nn.Parameter(s.tensor(), requires_grad=False)
    for guard in (None, torch._C.DisableTorchFunctionSubclass):
        x, g = torch.randn(2, 3, 172, requires_grad=True), torch.randn(2, 3, 37)
        layer.bias.grad = None
        if guard is None:
            layer(x).backward(g)
        else:
            with guard():
                layer(x).backward(g)
        torch.testing.assert_close(x.grad.double(), g.double() @ s.dense(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


# act_pre_scale


def test_act_pre_scale(kind):
    s = sample(100, 300, *kind)
    scale = torch.rand(300) + 0.5
    w = s.tensor(act_pre_scale=scale)
    assert_rounded(w.dequantize(), s.dense())  # the stored weight, without the scale
    effective = s.dense() * scale.double()
    x, bias = torch.randn(3, 300), torch.randn(100)

    def close(actual, expected):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-3)

    close(F.linear(x, w, bias), x.double() @ effective.t() + bias.double())
    close(x @ w.t(), x.double() @ effective.t())
    close(torch.addmm(bias, x, w.t()), x.double() @ effective.t() + bias.double())
    y = torch.randn(300, 4)
    close(w @ y, effective @ y.double())
    close(w.t() @ y[:100], effective.t() @ y[:100].double())
    close(y.t()[:, :100] @ w, y.t()[:, :100].double() @ effective)
    close(F.linear(y.t()[:, :100], w.t()), y.t()[:, :100].double() @ effective)
    for cut, part in ((w[:, 64:256], (slice(None), slice(64, 256))), (w[32:], (slice(32, None), slice(None)))):
        assert cut.act_pre_scale.shape == (cut.shape[1],)
        z = torch.randn(2, cut.shape[1])
        close(F.linear(z, cut), z.double() @ effective[part].t())
    assert w[:, 64:].act_pre_scale.data_ptr() == w.act_pre_scale[64:].data_ptr()
    for dim in (0, 1):
        assert torch.cat(w.split(64, dim), dim).equal(w)


def test_act_pre_scale_of_low_precision_inputs():
    """The scaled input keeps the dtype of the input."""
    s = sample(37, 172)
    w, x = s.tensor(torch.bfloat16, act_pre_scale=torch.full((172,), 0.5)), torch.randn(3, 172).bfloat16()
    y = F.linear(x, w)
    assert y.dtype == torch.bfloat16
    assert_product(y, x * 0.5, s.dense())


# models


def test_quantize_twice(caplog):
    model = nn.Sequential(nn.Linear(172, 37), nn.Linear(37, 64))
    quantize_(model, AAACConfig(group_size=32))
    before = [layer.weight for layer in model]
    with caplog.at_level(logging.INFO, logger="aaac_ao"):
        quantize_(model, AAACConfig(group_size=32))
    assert all(layer.weight is w for layer, w in zip(model, before, strict=True))
    lines = [r.getMessage() for r in caplog.records if "quantised already" in r.getMessage()]
    assert len(lines) == 2
    assert "Linear(172 -> 37)" in lines[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_to_half(kind, dtype):
    model = nn.Sequential(nn.Linear(172, 37), nn.ReLU(), nn.Linear(37, 20, bias=False))
    quantize_(model, AAACConfig(format=kind[0], group_size=16 if kind[0] == "nvfp4" else 32))
    x = torch.randn(5, 172)
    expected = model(x)
    stored = [model[0].weight.qdata.clone(), model[2].weight.scale.clone()]
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight.qdata, stored[0])
    assert torch.equal(model[2].weight.scale.view(torch.uint8), stored[1].view(torch.uint8))
    y = model(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert copy.deepcopy(model)[0].weight.equal(model[0].weight)
