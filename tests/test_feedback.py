"""Second-order rounding against the plain algorithm in fp64 and exhaustive search."""

import itertools

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor, Statistics, calibrate_
from aaac_ao.encode import encode
from aaac_ao.encode.feedback import _descend, _feedback, _Grid, damp, inverse_factor, row_errors


def correlated(tokens: int, k: int) -> torch.Tensor:
    return torch.randn(tokens, k) @ (torch.eye(k) + 1.5 * torch.randn(k, k) / k**0.5) * torch.randn(k).exp()


def statistics_of(x: torch.Tensor) -> Statistics:
    hessian = x.T @ x / len(x)
    return Statistics(hessian.diagonal().clone(), len(x), hessian)


def grid_of(n: int, k: int, group_size: int) -> _Grid:
    groups = -(-k // group_size)
    books = torch.randn(2, 16).sort(dim=1).values
    return _Grid(torch.rand(n, groups) + 0.1, torch.rand(n, groups) < 0.5, books, group_size)


def plain_feedback(weight, hessian, grid) -> torch.Tensor:
    """Optimal brain quantisation (arXiv 2208.11580), column by column, the inverse Hessian shrunk by elimination."""
    w, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.empty(weight.shape, dtype=torch.int64)
    for column in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
        entries = grid.entries[grid.book[:, column // grid.group_size]].double()
        levels = entries * grid.scale[:, column // grid.group_size, None].double()
        codes[:, column] = (w[:, column, None] - levels).abs().argmin(1)
        error = (w[:, column] - levels.gather(1, codes[:, column, None])[:, 0]) / inverse[column, column]
        w -= error[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize(("k", "group_size"), [(40, 16), (200, 64)])
def test_feedback_is_the_plain_algorithm(k, group_size):
    weight, grid = torch.randn(9, k), grid_of(9, k, group_size)
    hessian = damp(statistics_of(correlated(4 * k, k)).hessian, 0.01)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    codes = _feedback(weight, order, inverse_factor(hessian[order][:, order]), grid)
    expected = plain_feedback(weight, hessian, grid)
    # a single code at a midpoint may tip over by rounding, and the rest of its row with it
    rows = (codes == expected).all(1).double().mean()
    assert rows > 0.7
    errors = [row_errors(weight, grid.values(c), hessian).sum() for c in (codes, expected)]
    assert errors[0] == pytest.approx(float(errors[1]), rel=0.02)


def test_descent_ends_where_no_single_code_helps(monkeypatch):
    monkeypatch.setattr("aaac_ao.encode.feedback.SWEEPS", 60)
    weight, grid = torch.randn(4, 20), grid_of(4, 20, 16)
    hessian = damp(statistics_of(correlated(80, 20)).hessian, 0.01)
    codes = _descend(weight, hessian, grid, torch.randint(0, 16, (4, 20)))
    best = row_errors(weight, grid.values(codes), hessian)
    for column, code in itertools.product(range(20), range(16)):
        changed = codes.clone()
        changed[:, column] = code
        assert (row_errors(weight, grid.values(changed), hessian) >= best * (1 - 1e-4)).all()


@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 64)])
@pytest.mark.parametrize("codebooks", ["learned", "int4"])
def test_never_worse_than_nearest_and_much_better_on_correlated_inputs(fmt, group_size, codebooks):
    weight, statistics = torch.randn(48, 172) * 0.02, statistics_of(correlated(1000, 172))
    nearest = encode(weight, AAACConfig(fmt, group_size, codebooks), statistics)
    second = encode(weight, AAACConfig(fmt, group_size, codebooks, rounding="gptq"), statistics)
    errors = []
    for encoding in (nearest, second):
        grid = _Grid(encoding.scale, encoding.selector, encoding.codebooks, group_size)
        errors.append(row_errors(weight, grid.values(encoding.codes.long()), statistics.hessian))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.8 * errors[0].sum()
    assert float(second.error) == pytest.approx(float(errors[1].sum()), rel=1e-5)
    assert torch.equal(second.scale, nearest.scale)


def test_chunks_of_rows_do_not_show(monkeypatch):
    weight, statistics = torch.randn(50, 96), statistics_of(correlated(500, 96))
    config = AAACConfig("int4", 32, rounding="gptq")
    whole = encode(weight, config, statistics)
    import sys

    monkeypatch.setattr(sys.modules["aaac_ao.encode.encode"], "SECOND_ORDER_WEIGHTS", 7 * 96)
    parts = encode(weight, config, statistics)
    assert (whole.codes == parts.codes).double().mean() > 0.98  # other shapes of matrix products round differently
    assert float(parts.error) == pytest.approx(float(whole.error), rel=0.02)


@pytest.mark.parametrize("case", ["dead channels", "duplicate channels", "few tokens", "zeros"])
def test_degenerate_inputs(case):
    x = correlated(5 if case == "few tokens" else 300, 96)
    if case == "dead channels":
        x[:, ::3] = 0
    if case == "duplicate channels":
        x[:, 1::2] = x[:, ::2]
    if case == "zeros":
        x.zero_()
    weight = torch.randn(20, 96)
    weight[3] = 0
    encoding = encode(weight, AAACConfig("int4", 32, rounding="gptq"), statistics_of(x))
    assert torch.isfinite(encoding.error)
    dense = AAACTensor.from_encoding(encoding, AAACConfig("int4", 32), torch.float32).dequantize()
    assert torch.isfinite(dense).all()
    assert (dense[3] == 0).all()


def test_bad_statistics():
    config, weight = AAACConfig("int4", 32, rounding="gptq"), torch.randn(8, 64)
    with pytest.raises(ValueError, match="needs the full second moments"):
        encode(weight, config)
    with pytest.raises(ValueError, match="needs the full second moments"):
        encode(weight, config, Statistics(torch.ones(64), 3))
    with pytest.raises(ValueError, match=r"\[64, 64\], got \[32, 32\]"):
        encode(weight, config, Statistics(torch.ones(64), 3, torch.eye(32)))
    with pytest.raises(ValueError, match="NaN"):
        encode(weight, config, Statistics(torch.ones(64), 3, torch.full((64, 64), float("nan"))))


def test_through_quantize_and_calibrate(tiny_llama):
    config = AAACConfig(format="nvfp4", rounding="gptq")
    with pytest.raises(ValueError, match="needs data"):
        quantize_(tiny_llama(), config)
    linear = nn.Linear(64, 32)
    quantize_(linear, AAACConfig(format="nvfp4", step="prepare"))
    linear(torch.randn(9, 64))
    with pytest.raises(ValueError, match="was prepared without"):
        quantize_(linear, AAACConfig(format="nvfp4", rounding="gptq", step="convert"))
    x = correlated(500, 64)
    models = []
    for rounding in ("nearest", "gptq"):
        torch.manual_seed(0)
        linear = nn.Linear(64, 32)
        dense = linear(x)
        calibrate_(linear, AAACConfig(format="nvfp4", rounding=rounding), [x], progress=False)
        models.append((linear(x) - dense).square().mean())
    assert models[1] < 0.8 * models[0]
