"""Second-order rounding as a whole: what `encode` and `calibrate_` make of a weight."""

import pytest
import torch
from encode_oracle import correlated, damp, hessian_errors, statistics_of
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor, Statistics, calibrate_
from aaac_ao.codebooks import fixed_codebooks
from aaac_ao.encode import OutputMetric, encode


@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 64)])
@pytest.mark.parametrize("codebooks", ["learned", "int4"])
@pytest.mark.parametrize("rounding", ["gptq", "gptq-thorough"])
def test_never_worse_than_nearest_and_much_better_on_correlated_inputs(fmt, group_size, codebooks, rounding):
    weight, statistics = torch.randn(48, 172) * 0.02, statistics_of(correlated(1000, 172))
    nearest, encoding = (
        encode(weight, AAACConfig(fmt, group_size, codebooks, rounding=r), statistics) for r in ("nearest", rounding)
    )
    errors = [hessian_errors(e, weight, statistics.hessian, group_size).sum() for e in (nearest, encoding)]
    assert errors[1] < 0.8 * errors[0]
    hessian = statistics.hessian if rounding == "gptq-thorough" else damp(statistics.hessian, 0.01)
    expected = float(hessian_errors(encoding, weight, hessian, group_size).sum())
    assert float(encoding.error) == pytest.approx(expected, rel=1e-4 if rounding == "gptq-thorough" else 1e-3)


@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 32)])
@pytest.mark.parametrize("case", ["independent", "one token", "outliers"])
@pytest.mark.parametrize("rounding", ["gptq", "gptq-thorough"])
def test_never_worse_than_nearest_where_little_is_to_be_gained(fmt, group_size, case, rounding):
    x = torch.randn(1 if case == "one token" else 2000, 96)
    if case == "outliers":
        x[:, :3] *= 100
    statistics, weight = statistics_of(x), torch.randn(40, 96) * torch.randn(40, 1).exp()
    if case == "independent":
        diagonal = statistics.second_moment
        statistics = Statistics(diagonal, 2000, torch.diag(diagonal))
    encodings = [encode(weight, AAACConfig(fmt, group_size, rounding=r), statistics) for r in ("nearest", rounding)]
    errors = [hessian_errors(e, weight, statistics.hessian, group_size).sum() for e in encodings]
    assert errors[1] <= errors[0] * (1 + 1e-5)


@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 64)])
def test_one_pass_finds_the_scales_that_suit_a_dominant_channel(fmt, group_size):
    weight, x = torch.randn(48, 172), correlated(1000, 172)
    x[:, 100] *= 10 * x.std(0).max() / x[:, 100].std()
    statistics, errors = statistics_of(x), []
    for rounding in ("gptq", "nearest"):
        encoding = encode(weight, AAACConfig(fmt, group_size, "int4", rounding=rounding), statistics)
        errors.append(hessian_errors(encoding, weight, damp(statistics.hessian, 0.01), group_size).sum())
    assert errors[0] < 0.9 * errors[1]


def on_a_grid(case: str, fmt: str, group_size: int, n: int, k: int) -> torch.Tensor:
    if case == "constant":
        return torch.full((n, k), 0.25)
    levels = fixed_codebooks(case, group_size)[0]
    scale = (1 + torch.randint(0, 8, (n, -(-k // group_size))) / 8) * 2.0 ** torch.randint(-4, 0, (n, 1))
    weight = levels[torch.randint(0, 16, (n, k))] * scale.repeat_interleave(group_size, 1)[:, :k]
    weight[:, ::group_size] = levels.abs().max() * scale  # every group reaches the end of the grid
    weight[0] = 448 / 256 * levels.abs().max()  # in units of which all scales are those of E4M3
    return weight


@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 32)])
@pytest.mark.parametrize("case", ["constant", "fp4", "nf4"])
@pytest.mark.parametrize("coupled", [False, True])
def test_one_pass_keeps_weights_that_lie_on_a_grid(fmt, group_size, case, coupled):
    weight, statistics = on_a_grid(case, fmt, group_size, 40, 172), statistics_of(correlated(1000, 172))
    metric = OutputMetric(torch.cov(torch.randn(40, 200))) if coupled else None
    encoding = encode(weight, AAACConfig(fmt, group_size, rounding="gptq"), statistics, output_metric=metric)
    of_zeros = hessian_errors(encoding, weight * 0, statistics.hessian, group_size).sum()
    assert hessian_errors(encoding, weight, statistics.hessian, group_size).sum() < 1e-10 * of_zeros
    assert float(encoding.error) < 1e-10 * float(of_zeros)


@pytest.mark.parametrize(("fmt", "group_size"), [("nvfp4", 16), ("int4", 32), ("int4", 128)])
def test_one_pass_lies_between_nearest_and_more_of_them(fmt, group_size):
    weight, statistics = torch.randn(150, 300) * 0.02, statistics_of(correlated(1500, 300))
    errors = []
    for rounding in ("gptq-thorough", "gptq", "nearest"):
        encoding = encode(weight, AAACConfig(fmt, group_size, rounding=rounding), statistics)
        errors.append(hessian_errors(encoding, weight, statistics.hessian, group_size).sum())
    assert errors[0] < errors[1] < 0.8 * errors[2]


def test_one_pass_is_not_enough_for_independent_inputs():
    weight, diagonal = torch.randn(20, 64), torch.rand(64) + 0.1
    statistics = Statistics(diagonal, 2000, torch.diag(diagonal))
    found, thorough = (
        encode(weight, AAACConfig("int4", 32, rounding=r), statistics) for r in ("gptq", "gptq-thorough")
    )
    assert torch.equal(found.codes, thorough.codes)
    assert torch.equal(found.scale, thorough.scale)


@pytest.mark.parametrize("coupled", [False, True])
def test_the_last_layer_may_take_the_hessian_with_it(coupled):
    weight, statistics = torch.randn(20, 96), statistics_of(correlated(500, 96))
    config, metric = AAACConfig("int4", 32), OutputMetric(torch.eye(20)) if coupled else None
    expected = encode(weight, config, statistics, None, metric)
    found = encode(weight, config, statistics, None, metric, True)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert (statistics.hessian is None) != coupled  # a metric needs it to the end


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


@pytest.mark.parametrize("codebooks", ["nf4", "learned"])
@pytest.mark.parametrize("rounding", ["gptq", "gptq-thorough"])
def test_chunks_of_rows_do_not_show(monkeypatch, codebooks, rounding):
    weight, statistics = torch.randn(50, 96), statistics_of(correlated(500, 96))
    config = AAACConfig("int4", 32, rounding=rounding, codebooks=codebooks)
    whole = encode(weight, config, statistics)
    for constant in ("CHUNK_WEIGHTS", "ONCE_CHUNK_WEIGHTS"):
        monkeypatch.setattr(f"aaac_ao.encode.second_order.{constant}", 7 * 96)
    parts = encode(weight, config, statistics)
    # other shapes of matrix products round differently: a code may tip over and its row with it, and books see all rows
    same = (whole.codes == parts.codes).all(1).double().mean()
    assert same > 0.9 or not torch.equal(whole.codebooks, parts.codebooks)
    assert float(parts.error) == pytest.approx(float(whole.error), rel=0.02)


@pytest.mark.parametrize("rounding", ["gptq", "gptq-thorough"])
@pytest.mark.parametrize("case", ["dead channels", "duplicate channels", "few tokens", "zeros"])
def test_degenerate_inputs(case, rounding):
    x = correlated(5 if case == "few tokens" else 300, 96)
    if case == "dead channels":
        x[:, ::3] = 0
    if case == "duplicate channels":
        x[:, 1::2] = x[:, ::2]
    if case == "zeros":
        x.zero_()
    weight = torch.randn(20, 96)
    weight[3] = 0
    encoding = encode(weight, AAACConfig("int4", 32, rounding=rounding), statistics_of(x))
    assert torch.isfinite(encoding.error)
    dense = AAACTensor.from_encoding(encoding, AAACConfig("int4", 32), torch.float32).dequantize()
    assert torch.isfinite(dense).all()
    assert (dense[3] == 0).all()


def test_bad_statistics():
    config, weight = AAACConfig("int4", 32, rounding="gptq"), torch.randn(8, 64)
    for rounding in ("gptq", "gptq-thorough"):
        with pytest.raises(ValueError, match=f"rounding='{rounding}' needs the full second moments"):
            encode(weight, AAACConfig("int4", 32, rounding=rounding))
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
    with pytest.raises(ValueError, match="was prepared with rounding='nearest'"):
        quantize_(linear, AAACConfig(format="nvfp4", rounding="gptq", step="convert"))
    x = correlated(500, 64)
    models = []
    for rounding in ("nearest", "gptq", "gptq-thorough"):
        torch.manual_seed(0)
        linear = nn.Linear(64, 32)
        dense = linear(x)
        calibrate_(linear, AAACConfig(format="nvfp4", rounding=rounding), [x], progress=False)
        models.append((linear(x) - dense).square().mean())
    assert models[2] < models[1] < 0.8 * models[0]
