"""Second-order rounding against the plain algorithm in fp64 and exhaustive search."""

from functools import partial

import pytest
import torch
from encode_oracle import correlated, damp, hessian_errors, statistics_of

from aaac_ao import AAACConfig
from aaac_ao.encode import encode
from aaac_ao.encode.factor import times_inverse, upper_factor, upper_factors
from aaac_ao.encode.feedback import Order, descend, errors_by_factor, feedback, row_errors
from aaac_ao.encode.grid import Grid
from aaac_ao.encode.least_squares import fit_books, fit_scales
from aaac_ao.encode.rounding import Metric
from aaac_ao.formats import FORMATS
from aaac_ao.kernels.cpu import rounding as compiled


def grid_of(n: int, k: int, group_size: int) -> Grid:
    groups = -(-k // group_size)
    books = torch.randn(2, 16).sort(dim=1).values
    selector = torch.randint(0, 2, (groups, n), dtype=torch.uint8)
    return Grid((torch.rand(groups, n) + 0.1).bfloat16().float(), selector, books, group_size)


def test_grid_values_are_those_of_the_format():
    grid, codes = grid_of(7, 200, 64), torch.randint(0, 16, (200, 7))
    values = grid.values(codes)
    for column, row in zip(torch.randint(0, 200, (40,)).tolist(), torch.randint(0, 7, (40,)).tolist(), strict=True):
        book = grid.codebooks[int(grid.selector[column // 64, row])]
        assert values[column, row] == grid.scale[column // 64, row] * book[codes[column, row]]
    assert torch.equal(grid.entries[grid.index(codes)] * grid.column_scales(200), values)


@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (172, 64), (16, 16)])
def test_order_is_group_after_group_by_importance(k, group_size):
    diagonal = torch.rand(k)
    diagonal[torch.randint(0, k, (3,))] = 0
    order = Order.of_importance(diagonal, group_size)
    assert order.columns.sort().values.tolist() == list(range(k))
    groups = diagonal.split(group_size)
    importance = [float(group.mean()) if len(group) == group_size else -1.0 for group in groups]
    assert order.groups.tolist() == sorted(range(len(groups)), key=lambda g: -importance[g])
    assert order.sizes == [len(groups[g]) for g in order.groups]
    for group, columns in zip(order.groups.tolist(), order.columns.split(order.sizes), strict=True):
        assert set((columns // group_size).tolist()) == {group}
        assert (diagonal[columns].diff() <= 0).all()


def test_factors_of_several_matrices_are_those_of_each():
    """Among them one of zeros and a singular one, which are damped alone."""
    x = torch.stack([correlated(100, 40) for _ in range(4)])
    matrices = x.mT @ x / 100
    matrices[1] = 0
    matrices[2, :, 7] = matrices[2, 7] = 0
    columns = torch.arange(40)
    for factor, matrix in zip(upper_factors(matrices), matrices, strict=True):
        assert torch.allclose(factor, upper_factor(matrix, columns, [40], share=0.0)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be factorised"):
        upper_factors(torch.full((2, 8, 8), float("nan")))


def plain_feedback(weight, hessian, order, grid, candidates) -> torch.Tensor:
    """Optimal brain quantisation (arXiv 2208.11580) in fp64, the inverse Hessian shrunk by elimination.

    Every scale and book of a group is tried, by the sum of what each rounding adds to the error of the whole row.
    """
    w, inverse = weight.double().t().clone(), torch.linalg.inv(hessian.double())
    rows, values = torch.arange(len(w)), torch.empty_like(w)

    def rounded(w, inverse, columns, scale, book):
        w, inverse, cost = w.clone(), inverse.clone(), torch.zeros(len(w), dtype=torch.float64)
        for column in columns:
            levels = scale[:, None] * grid.codebooks.double()[book]
            value = levels[rows, (w[:, column, None] - levels).abs().argmin(1)]
            error = (w[:, column] - value) / inverse[column, column]
            cost += error.square() * inverse[column, column]
            values[:, column] = value
            w -= error[:, None] * inverse[column]
            inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        return w, inverse, cost

    for group, columns in zip(order.groups.tolist(), order.columns.split(order.sizes), strict=True):
        best = torch.full((len(w),), float("inf"), dtype=torch.float64)
        chosen, books = torch.zeros_like(best), torch.zeros(len(w), dtype=torch.int64)
        for scale in candidates(grid.scale[group][None])[:, 0].double():
            for book in (0, 1):
                cost = rounded(w, inverse, columns.tolist(), scale, torch.full_like(books, book))[2]
                better = cost < best
                best, chosen = torch.where(better, cost, best), torch.where(better, scale, chosen)
                books[better] = book
        w, inverse, _ = rounded(w, inverse, columns.tolist(), chosen, books)
    return values.t()


@pytest.mark.parametrize(("k", "group_size"), [(40, 16), (90, 32)])
def test_feedback_is_the_plain_algorithm(k, group_size, monkeypatch):
    monkeypatch.setattr("aaac_ao.encode.rounding.SWEEPS", 0)
    weight, grid = torch.randn(k, 9), grid_of(9, k, group_size)
    hessian = damp(statistics_of(correlated(4 * k, k)).hessian, 0.01)
    order = Order.of_importance(hessian.diagonal(), group_size)
    candidates = lambda scale: torch.stack([scale, 0.9 * scale, 1.1 * scale])  # noqa: E731
    factor = upper_factor(hessian, order.columns, order.blocks(), share=0.0)
    metrics = [Metric.of_panel(panel) for panel in factor]
    chosen, codes, lost = feedback(weight, order, factor, metrics, grid, candidates)
    assert torch.allclose(lost.double(), row_errors(weight, chosen.values(codes), hessian), rtol=1e-3)
    values, expected = chosen.values(codes), plain_feedback(weight, hessian, order, grid, candidates)
    # a single code at a midpoint may tip over by rounding, and the rest of its row with it
    rows = ((values - expected).abs() < 1e-5).all(0).double().mean()
    assert rows > 0.7
    errors = [row_errors(weight, v.float(), hessian).sum() for v in (values, expected)]
    assert errors[0] == pytest.approx(float(errors[1]), rel=0.02)


@pytest.mark.parametrize(("k", "group_size"), [(100, 32), (300, 128), (40, 16)])
def test_descent_never_raises_a_row_and_stays_on_the_grid(k, group_size):
    weight, grid = torch.randn(k, 11), grid_of(11, k, group_size)
    hessian = damp(statistics_of(correlated(2 * k, k)).hessian, 0.01)
    codes = torch.randint(0, 16, (k, 11), dtype=torch.uint8)
    candidates = lambda scale: torch.stack([scale, 0.95 * scale, 1.05 * scale])  # noqa: E731
    before = (grid.scale.clone(), codes.clone())
    errors = [row_errors(weight, grid.values(codes), hessian)]
    moved, new = descend(weight, hessian, grid, codes, candidates)
    assert torch.equal(grid.scale, before[0])
    assert torch.equal(codes, before[1])
    assert new.max() < 16
    tried = torch.stack([before[0], 0.95 * before[0], 1.05 * before[0]])
    assert (moved.scale == tried).any(0).all()
    errors.append(row_errors(weight, moved.values(new), hessian))
    again = descend(weight, hessian, moved, new, lambda scale: scale[None])
    errors.append(row_errors(weight, again[0].values(again[1]), hessian))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[2] <= errors[1] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.5 * errors[0].sum()


def test_two_passes_are_one_after_the_other():
    """What a pass hands to the next, the gradient and refitted scales, against starting from scratch."""
    k, n, size = 200, 64, 32
    weight, grid = torch.randn(k, n), grid_of(n, k, size)
    hessian = damp(statistics_of(correlated(2 * k, k)).hessian, 0.01)
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    around = lambda scale: torch.stack([scale, 0.98 * scale, 1.02 * scale])  # noqa: E731
    refit = partial(fit_scales, fmt=FORMATS["int4"], per_tensor_scale=None)
    once = descend(weight, hessian, grid, codes, around, refit=refit)
    expected = descend(weight, hessian, *once, around, refit=refit)
    both = descend(weight, hessian, grid, codes, around, refit=refit, passes=2)
    errors = [row_errors(weight, g.values(c), hessian) for g, c in (once, expected, both)]
    same = (both[1] == expected[1]).all(0)  # a code at a midpoint may tip over by rounding, and the rest of its row
    assert same.double().mean() > 0.8
    assert torch.allclose(errors[2][same], errors[1][same], rtol=1e-3)
    assert errors[2].sum() < 0.99 * errors[0].sum()


def test_where_descent_ends_no_single_code_helps(monkeypatch):
    monkeypatch.setattr("aaac_ao.encode.rounding.SWEEPS", 40)
    weight, grid = torch.randn(20, 4), grid_of(4, 20, 16)
    hessian = damp(statistics_of(correlated(80, 20)).hessian, 0.01)
    codes = torch.randint(0, 16, (20, 4), dtype=torch.uint8)
    for _ in range(5):  # one block of 64 columns holds them all
        grid, codes = descend(weight, hessian, grid, codes, lambda scale: scale[None])
    best = row_errors(weight, grid.values(codes), hessian)
    for column in range(20):
        for code in range(16):
            changed = codes.clone()
            changed[column] = code
            assert (row_errors(weight, grid.values(changed), hessian) >= best * (1 - 1e-4)).all()


def test_errors_by_the_factor_are_those_under_the_damped_hessian():
    hessian, errors = statistics_of(correlated(900, 300)).hessian, torch.randn(300, 7)
    order = Order.of_importance(hessian.diagonal(), 64)
    factor = upper_factor(hessian, order.columns, order.blocks())
    found = errors_by_factor(errors, order, factor)
    expected = row_errors(errors.double(), torch.zeros(300, 7).double(), damp(hessian, 0.01).double())
    assert torch.allclose(found.double(), expected, rtol=1e-3)


def test_times_the_inverse_of_what_the_factor_is_of():
    hessian, x = statistics_of(correlated(900, 300)).hessian, torch.randn(7, 300)
    order = Order.of_importance(hessian.diagonal(), 64)
    expected = torch.linalg.solve(damp(hessian, 0.01).double(), x.t().double()).t()
    found = x[:, order.columns]
    times_inverse(found, upper_factor(hessian, order.columns, order.blocks()))
    assert torch.allclose(
        found.double(), expected[:, order.columns], rtol=1e-2, atol=1e-4 * float(expected.abs().max())
    )


def test_one_pass_with_fixed_books_and_scales_is_the_plain_algorithm(monkeypatch):
    monkeypatch.setattr("aaac_ao.encode.rounding.SWEEPS", 0)
    weight, statistics = torch.randn(9, 160), statistics_of(correlated(640, 160))
    config = AAACConfig("int4", 32, codebooks="int4", scale_search=False, rounding="gptq")
    encoding, hessian = encode(weight, config, statistics), damp(statistics.hessian, 0.01)
    grid = Grid(encoding.scale.t(), encoding.selector.t().to(torch.uint8), encoding.codebooks, 32)
    order = Order.of_importance(hessian.diagonal(), 32)
    expected = plain_feedback(weight.t(), hessian, order, grid, lambda scale: scale[None])
    # a single code at a midpoint may tip over by rounding, and the rest of its row with it
    assert ((grid.values(encoding.codes.t()) - expected).abs() < 1e-5).all(0).double().mean() > 0.7
    rounded = encode(weight, AAACConfig("int4", 32, codebooks="int4", scale_search=False, rounding="nearest"))
    assert torch.equal(encoding.scale, rounded.scale)


def test_products_in_bfloat16_lose_little(monkeypatch):
    """Rows that are made up for in bf16 and in fp32 end differently, but about as well."""
    weight, x = torch.randn(40, 700), correlated(3000, 700)
    hessian, errors = x.T @ x / len(x), []
    for fast in (False, True):
        monkeypatch.setattr(compiled, "has_bfloat16", lambda fast=fast: fast)
        encoding = encode(weight, AAACConfig("int4", 64, rounding="gptq"), statistics_of(x))
        errors.append(float(hessian_errors(encoding, weight, hessian, 64).sum()))
    assert errors[0] != errors[1]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_books_and_scales_are_fitted_by_least_squares():
    """Against solving for books and scales in fp64 from the definition."""
    k, n, size = 48, 30, 32
    weight, grid, codes = torch.randn(k, n), grid_of(n, k, size), torch.randint(0, 16, (k, n))
    hessian = damp(statistics_of(correlated(300, k)).hessian, 0.01)
    root = torch.linalg.cholesky(hessian.double()).T
    design = torch.zeros(n, k, 32, dtype=torch.float64)
    index = codes + 16 * grid.selector.long().repeat_interleave(size, 0)[:k]
    design.scatter_(2, index.T[..., None], grid.scale.double().repeat_interleave(size, 0)[:k].T[..., None])
    expected = torch.linalg.lstsq((root @ design).view(-1, 32), (root @ weight.double()).T.reshape(-1)).solution
    books = fit_books(weight, hessian, grid, codes)
    assert torch.allclose(books.view(-1).double(), expected, rtol=0.02, atol=0.02)

    before = row_errors(weight, grid.values(codes), hessian)
    entries, pull = grid.entries[grid.index(codes)], hessian @ (grid.values(codes) - weight)
    scale = fit_scales(entries, grid.scale, pull, hessian, size, FORMATS["int4"], None)
    fitted = Grid(scale, grid.selector, grid.codebooks, size)
    assert torch.equal(scale, scale.bfloat16().float())
    assert (row_errors(weight, fitted.values(codes), hessian) <= before * (1 + 1e-6)).all()
    last = hessian[32:, 32:].double()  # the last group is the exact minimum, given the others
    entry = grid.entries[index][32:].double()
    pull = ((hessian[32:].double() @ (fitted.values(codes).double() - weight.double())) * entry).sum(0)
    best = scale[1].double() - pull / ((last @ entry) * entry).sum(0)
    free = best > 0
    assert torch.allclose(scale[1, free].double(), best[free], rtol=2**-7)
