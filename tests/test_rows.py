"""Rows that make up for each other's errors, against fp64 from the definitions and exhaustive search."""

import pytest
import torch
from encode_oracle import dequantised, statistics_of

from aaac_ao import AAACConfig
from aaac_ao.encode import OutputMetric, encode, output_error, second_order
from aaac_ao.encode.rows import OUTPUT_DAMPING, CoupledRows
from aaac_ao.kernels.cpu import rounding as compiled


def random_metric(n: int, share: float = 3.0) -> torch.Tensor:
    """A few directions matter most, as in real models."""
    few = torch.randn(n, max(1, n // 8))
    return few @ few.T * share / few.shape[1] + torch.diag(torch.rand(n))


def correlated(tokens: int, k: int) -> torch.Tensor:
    return torch.randn(tokens, k) @ (torch.eye(k) + 1.5 * torch.randn(k, k) / k**0.5)


def exact_error(weight, encoding, group_size: int, hessian, metric) -> float:
    error = weight.double() - dequantised(encoding, group_size)
    return float(torch.trace(metric.double() @ error @ hessian.double() @ error.T))


def test_the_metric_is_scaled_and_damped():
    matrix = random_metric(20) * 1e-7
    metric = OutputMetric(matrix)
    expected = matrix.double() / matrix.double().diagonal().mean() + OUTPUT_DAMPING * torch.eye(20)
    assert torch.allclose(metric.matrix.double(), expected, atol=1e-5)
    assert (metric.matrix.diagonal()[metric.order].diff() <= 0).all()
    assert torch.equal(OutputMetric(torch.zeros(5, 5)).matrix, (1 + OUTPUT_DAMPING) * torch.eye(5))


def test_the_factor_is_one():
    metric = OutputMetric(random_metric(24))
    assert torch.equal(metric.lower, metric.lower.tril())
    assert torch.allclose(metric.lower.T @ metric.lower, metric.matrix[metric.order][:, metric.order], atol=1e-4)


def test_targets_minimise_the_error_of_the_rows_that_follow():
    """With errors of some rows fixed, the target of a later row is its best value while all behind it are free."""
    n, k = 40, 6
    weight, metric, hessian = torch.randn(n, k), OutputMetric(random_metric(n)), torch.diag(torch.rand(k) + 0.1)
    rows, order = CoupledRows(weight, metric, hessian), metric.order
    chunks = list(rows.chunks())
    assert torch.equal(torch.cat(chunks), order)
    first, second = chunks[0], chunks[1]
    assert torch.equal(rows.target(first), weight[first])
    error = torch.randn(len(first), k)
    rows.settle(first, lambda: weight[first] - error)
    free = order[len(first) :]
    m = metric.matrix.double()
    # minimise tr(M E E^T) over the free rows: E_free = -M_ff^-1 M_fs E_s
    best = -torch.linalg.solve(m[free][:, free], m[free][:, first] @ error.double())
    move = rows.target(second).double() - weight[second].double()
    assert torch.allclose(move, -best[: len(second)], atol=1e-3)

    errors = torch.randn(n, k)
    rows = CoupledRows(weight, metric, hessian)
    rows.again(lambda chunk: weight[chunk] - errors[chunk])
    for chunk in rows.chunks():
        others = torch.ones(n, dtype=torch.bool)
        others[chunk] = False
        move = torch.linalg.solve(m[chunk][:, chunk], m[chunk][:, others] @ errors[others].double())
        target = rows.target(chunk)
        assert torch.allclose(target.double(), weight[chunk].double() + move, atol=1e-3)
        changed = errors.clone()
        changed[chunk] += torch.randn(len(chunk), k) * 0.3
        old, new = (torch.trace(m @ e.double() @ hessian.double() @ e.double().T) for e in (errors, changed))
        lost = [target - (weight - e)[chunk] for e in (errors, changed)]
        assert rows.better(chunk, *lost) == bool(new < old)


def test_output_error_is_the_trace():
    error, metric = torch.randn(13, 300), OutputMetric(random_metric(13))
    hessian = statistics_of(correlated(600, 300)).hessian
    for given, m in ((metric, metric.matrix), (None, torch.eye(13))):
        expected = torch.trace(m.double() @ error.double() @ hessian.double() @ error.double().T)
        assert float(output_error(error, hessian, given)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("rounding", ["gptq", "gptq-thorough"])
@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 64)])
def test_coupled_rows_lose_less_in_the_metric(fmt, group_size, rounding):
    n, k = 72, 172
    weight, statistics, metric = (
        torch.randn(n, k) * 0.02,
        statistics_of(correlated(1000, k)),
        OutputMetric(random_metric(n, 9.0)),
    )
    config = AAACConfig(fmt, group_size, rounding=rounding)
    nearest = encode(weight, AAACConfig(fmt, group_size, rounding="nearest"), statistics)
    plain, coupled = encode(weight, config, statistics), encode(weight, config, statistics, output_metric=metric)
    errors = [exact_error(weight, e, group_size, statistics.hessian, metric.matrix) for e in (nearest, plain, coupled)]
    assert errors[2] < 0.85 * errors[1] < 0.85 * errors[0]
    assert float(coupled.error) == pytest.approx(errors[2], rel=1e-3)


def test_a_second_pass_over_coupled_rows_loses_less(monkeypatch):
    config, errors = AAACConfig("int4", 32, rounding="gptq-thorough"), [0.0, 0.0]
    for _ in range(8):  # the bound is about weights on average: a single one gains 1.4 +- 0.5 %
        weight, statistics = torch.randn(64, 96), statistics_of(correlated(500, 96))
        metric = OutputMetric(random_metric(64, 9.0))
        for passes in (1, 2):
            monkeypatch.setattr(CoupledRows, "passes", passes)
            encoding = encode(weight, config, statistics, output_metric=metric)
            errors[passes - 1] += exact_error(weight, encoding, 32, statistics.hessian, metric.matrix)
    assert errors[1] < 0.995 * errors[0]


@pytest.mark.skipif(compiled.library() is None, reason="without the library there is no annealing")
def test_annealing_inside_blocks_helps_coupled_rows(monkeypatch):
    weight, statistics = torch.randn(64, 172), statistics_of(correlated(700, 172))
    config, metric, errors = AAACConfig("int4", 32, rounding="gptq"), OutputMetric(random_metric(64, 9.0)), []
    for sweeps in (0, second_order.COUPLED_SWEEPS):
        monkeypatch.setattr(second_order, "COUPLED_SWEEPS", sweeps)
        encoding = encode(weight, config, statistics, output_metric=metric)
        errors.append(exact_error(weight, encoding, 32, statistics.hessian, metric.matrix))
    assert errors[1] < 0.98 * errors[0]


# one pass wins more than a little, as it anneals, and tries more scales, only with a metric
@pytest.mark.parametrize(("rounding", "least"), [("gptq", 0.8), ("gptq-thorough", 0.97)])
def test_a_metric_without_couplings_changes_little(rounding, least):
    weight, statistics = torch.randn(40, 96), statistics_of(correlated(500, 96))
    config, metric = AAACConfig("int4", 32, rounding=rounding), OutputMetric(torch.eye(40))
    plain, alike = encode(weight, config, statistics), encode(weight, config, statistics, output_metric=metric)
    before, after = (exact_error(weight, found, 32, statistics.hessian, torch.eye(40)) for found in (plain, alike))
    assert least * before < after < 1.03 * before
    assert float(alike.error) == pytest.approx((1 + OUTPUT_DAMPING) * after, rel=1e-3)


def test_bad_metrics():
    config, weight, statistics = (
        AAACConfig("int4", 32, rounding="gptq"),
        torch.randn(8, 64),
        statistics_of(correlated(99, 64)),
    )
    with pytest.raises(ValueError, match=r"output_metric must have shape \[8, 8\], got \[9, 9\]"):
        encode(weight, config, statistics, output_metric=OutputMetric(torch.eye(9)))
    with pytest.raises(ValueError, match=r"\[out_features, out_features\], got \[3, 4\]"):
        OutputMetric(torch.rand(3, 4))
    with pytest.raises(ValueError, match="NaN"):
        OutputMetric(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="negative"):
        OutputMetric(-torch.eye(3))
    with pytest.raises(ValueError, match="not positive semidefinite"):
        OutputMetric(torch.tensor([[1.0, 9.0], [9.0, 1.0]])).lower  # noqa: B018


def test_metrics_of_stacked_layers_are_joined():
    parts = [OutputMetric(random_metric(n)) for n in (5, 9)]
    joined = OutputMetric.joined(parts)
    assert len(joined) == 14
    assert (joined.matrix[:5, 5:] == 0).all()
    assert torch.allclose(joined.matrix[:5, :5], parts[0].matrix, rtol=1e-4, atol=1e-5)  # damped once
    assert torch.allclose(joined.matrix[5:, 5:], parts[1].matrix, rtol=1e-4, atol=1e-5)
    assert OutputMetric.joined(parts[:1]) is parts[0]
