"""Second-order rounding against the plain algorithm in fp64 and exhaustive search."""

import itertools

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor, Statistics, calibrate_
from aaac_ao.encode import encode
from aaac_ao.encode.feedback import Grid, damp, descend, feedback, inverse_factor, row_errors


def correlated(tokens: int, k: int) -> torch.Tensor:
    return torch.randn(tokens, k) @ (torch.eye(k) + 1.5 * torch.randn(k, k) / k**0.5) * torch.randn(k).exp()


def statistics_of(x: torch.Tensor) -> Statistics:
    hessian = x.T @ x / len(x)
    return Statistics(hessian.diagonal().clone(), len(x), hessian)


def grid_of(n: int, k: int, group_size: int) -> Grid:
    groups = -(-k // group_size)
    books = torch.randn(2, 16).sort(dim=1).values
    return Grid((torch.rand(n, groups) + 0.1).bfloat16().float(), torch.rand(n, groups) < 0.5, books, group_size)


def levels_of(grid: Grid, column: int) -> torch.Tensor:
    """[N, 16] the values that a column can take, fp64."""
    group = column // grid.group_size
    return (grid.entries.view(2, 16)[grid.book[group].long()] * grid.scale[group, :, None]).double()


def plain_feedback(weight, hessian, grid) -> torch.Tensor:
    """Optimal brain quantisation (arXiv 2208.11580), column by column, the inverse Hessian shrunk by elimination."""
    w, inverse = weight.double().t().clone(), torch.linalg.inv(hessian.double())
    codes = torch.empty(w.shape, dtype=torch.int64)
    for column in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
        levels = levels_of(grid, column)
        codes[:, column] = (w[:, column, None] - levels).abs().argmin(1)
        error = (w[:, column] - levels.gather(1, codes[:, column, None])[:, 0]) / inverse[column, column]
        w -= error[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes.t()


def test_grid_finds_the_nearest_entry():
    group_size = 16
    grid = grid_of(500, 48, group_size)
    grid.scale[1, ::7] = 0
    for column in (0, 17, 47):
        w = torch.randn(500) * 2
        codes, values = grid.nearest(w, column)
        levels = levels_of(grid, column)
        distances = (w[:, None] - levels).abs()
        assert torch.equal(levels.gather(1, codes[:, None].long())[:, 0].float(), values)
        # entries closer to each other than a bin of the table count as one
        bins = 2.5 * grid.entries.abs().max() / 4096 * grid.scale[column // group_size]
        assert (distances.gather(1, codes[:, None].long())[:, 0] <= distances.amin(1) + bins).all()
        assert (distances.argmin(1) == codes)[grid.scale[column // group_size] > 0].double().mean() > 0.97


@pytest.mark.parametrize(("k", "group_size"), [(40, 16), (200, 64)])
def test_feedback_is_the_plain_algorithm(k, group_size):
    weight, grid = torch.randn(k, 9), grid_of(9, k, group_size)
    hessian = damp(statistics_of(correlated(4 * k, k)).hessian, 0.01)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    codes = feedback(weight, order, inverse_factor(hessian, order, 0.0), grid)
    expected = plain_feedback(weight, hessian, grid)
    # a single code at a midpoint may tip over by rounding, and the rest of its row with it
    rows = (codes == expected).all(0).double().mean()
    assert rows > 0.7
    errors = [row_errors(weight, grid.values(c), hessian).sum() for c in (codes, expected)]
    assert errors[0] == pytest.approx(float(errors[1]), rel=0.02)


def test_descent_ends_where_no_single_code_helps(monkeypatch):
    monkeypatch.setattr("aaac_ao.encode.feedback.SWEEPS", 60)
    weight, grid = torch.randn(20, 4), grid_of(4, 20, 16)
    hessian = damp(statistics_of(correlated(80, 20)).hessian, 0.01)
    codes = descend(weight, hessian, grid, torch.randint(0, 16, (20, 4), dtype=torch.int32))
    best = row_errors(weight, grid.values(codes), hessian)
    for column, code in itertools.product(range(20), range(16)):
        changed = codes.clone()
        changed[column] = code
        assert (row_errors(weight, grid.values(changed), hessian) >= best * (1 - 1e-4)).all()


def hessian_errors(encoding, weight, hessian, group_size) -> torch.Tensor:
    """The objective of every row in fp64, from the definition of the format."""
    columns = torch.arange(weight.shape[1])
    book = encoding.selector[:, columns // group_size].long()
    value = encoding.codebooks[book, encoding.codes.long()] * encoding.scale[:, columns // group_size]
    error = weight.double() - value.double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 64)])
@pytest.mark.parametrize("codebooks", ["learned", "int4"])
def test_never_worse_than_nearest_and_much_better_on_correlated_inputs(fmt, group_size, codebooks):
    weight, statistics = torch.randn(48, 172) * 0.02, statistics_of(correlated(1000, 172))
    errors = []
    for rounding in ("nearest", "gptq"):
        encoding = encode(weight, AAACConfig(fmt, group_size, codebooks, rounding=rounding), statistics)
        errors.append(hessian_errors(encoding, weight, statistics.hessian, group_size))
    assert errors[1].sum() < 0.8 * errors[0].sum()
    assert float(encoding.error) == pytest.approx(float(errors[1].sum()), rel=1e-4)


@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 32)])
@pytest.mark.parametrize("case", ["independent", "one token", "outliers"])
def test_never_worse_than_nearest_where_little_is_to_be_gained(fmt, group_size, case):
    x = torch.randn(1 if case == "one token" else 2000, 96)
    if case == "outliers":
        x[:, :3] *= 100
    statistics, weight = statistics_of(x), torch.randn(40, 96) * torch.randn(40, 1).exp()
    if case == "independent":
        diagonal = statistics.second_moment
        statistics = Statistics(diagonal, 2000, torch.diag(diagonal))
    encodings = [encode(weight, AAACConfig(fmt, group_size, rounding=r), statistics) for r in ("nearest", "gptq")]
    errors = [hessian_errors(e, weight, statistics.hessian, group_size).sum() for e in encodings]
    assert errors[1] <= errors[0] * (1 + 1e-5)


def test_auto_is_second_order_exactly_where_there_is_a_hessian():
    weight, statistics = torch.randn(20, 64), statistics_of(correlated(300, 64))
    for given, rounding in ((statistics, "gptq"), (Statistics(statistics.second_moment, 300), "nearest")):
        expected = encode(weight, AAACConfig(group_size=32, rounding=rounding), given)
        assert torch.equal(encode(weight, AAACConfig(group_size=32), given).codes, expected.codes)


def test_an_output_shift_is_made_up_for():
    """Inputs that lost a part the other channels predict: the corrected weight wins most of it back."""
    original = correlated(4000, 64)
    seen = original.clone()
    seen[:, :16] *= 0.5
    weight = torch.randn(24, 64)
    difference = (original - seen).T @ seen / len(seen)
    statistics, config = statistics_of(seen), AAACConfig("int4", 32)
    errors = []
    for output_shift in (None, weight @ difference):
        encoding = encode(weight, config, statistics, output_shift)
        tensor = AAACTensor.from_encoding(encoding, config, torch.float32)
        errors.append((seen @ tensor.dequantize().T - original @ weight.T).square().mean())
    assert errors[1] < 0.5 * errors[0]


def test_books_and_scales_are_fitted_by_least_squares():
    """Against solving for books and scales in fp64 from the definition."""
    from aaac_ao.encode.least_squares import BookFit, fit_scales
    from aaac_ao.formats import FORMATS

    k, n, size = 48, 30, 32
    weight, grid, codes = torch.randn(k, n), grid_of(n, k, size), torch.randint(0, 16, (k, n))
    hessian = damp(statistics_of(correlated(300, k)).hessian, 0.01)
    fit = BookFit(hessian, grid.entries.view(2, 16))
    fit.add(weight, codes, grid, stride=1)
    root = torch.linalg.cholesky(hessian.double()).T
    design = torch.zeros(n, k, 32, dtype=torch.float64)
    index = codes + 16 * grid.book.long().repeat_interleave(size, 0)[:k]
    design.scatter_(2, index.T[..., None], grid.scale.double().repeat_interleave(size, 0)[:k].T[..., None])
    expected = torch.linalg.lstsq((root @ design).view(-1, 32), (root @ weight.double()).T.reshape(-1)).solution
    assert torch.allclose(fit.solve().view(-1).double(), expected, rtol=0.02, atol=0.02)

    before = row_errors(weight, grid.values(codes), hessian)
    scale = fit_scales(weight, hessian, grid, codes, FORMATS["int4"], None)
    assert torch.equal(scale, scale.bfloat16().float())
    after = row_errors(weight, Grid(scale, grid.book.T == 1, grid.entries.view(2, 16), size).values(codes), hessian)
    assert (after <= before * (1 + 1e-6)).all()
    last = hessian[32:, 32:].double()  # the last group is the exact minimum, given the others
    entry = grid.entries[index][32:].double()
    error = Grid(scale, grid.book.T == 1, grid.entries.view(2, 16), size).values(codes).double() - weight.double()
    pull = ((hessian[32:].double() @ error) * entry).sum(0)
    best = scale[:, 1].double() - pull / ((last @ entry) * entry).sum(0)
    free = best > 0
    assert torch.allclose(scale[free, 1].double(), best[free], rtol=2**-7)


def test_chunks_of_rows_do_not_show(monkeypatch):
    weight, statistics = torch.randn(50, 96), statistics_of(correlated(500, 96))
    config = AAACConfig("int4", 32, rounding="gptq")
    whole = encode(weight, config, statistics)
    monkeypatch.setattr("aaac_ao.encode.second_order.CHUNK_WEIGHTS", 7 * 96)
    parts = encode(weight, config, statistics)
    assert (whole.codes == parts.codes).double().mean() > 0.97  # other shapes of matrix products round differently
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
    with pytest.raises(ValueError, match=r"output_shift must have shape \[8, 64\]"):
        encode(weight, config, Statistics(torch.ones(64), 3, torch.eye(64)), torch.ones(64, 64))


def test_through_quantize_and_calibrate(tiny_llama):
    config = AAACConfig(format="nvfp4", rounding="gptq")
    with pytest.raises(ValueError, match="needs data"):
        quantize_(tiny_llama(), config)
    linear = nn.Linear(64, 32)
    quantize_(linear, AAACConfig(format="nvfp4", rounding="nearest", step="prepare"))
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
