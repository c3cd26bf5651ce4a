"""The encoder against exhaustive search in fp64, on ordinary and on pathological weights."""

import pytest
import torch
from encode_oracle import (
    ENCODE,
    WEIGHTS,
    all_formats,
    best_group_errors,
    both_formats,
    check_encoding,
    cut,
    dequantised,
    importance_of,
    nearest_of,
    random_statistics,
    rounding,
    storable,
    torchao_version,
    weighted_error,
)
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from aaac_ao import AAACConfig
from aaac_ao.codebooks import FIXED_CODEBOOKS, fixed_codebooks, learned_start, top_of
from aaac_ao.encode import encode
from aaac_ao.encode.scales import BF16_RATIOS, E4M3_RATIOS, ScaleTable, search_scales
from aaac_ao.formats import FORMATS


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@both_formats
@pytest.mark.parametrize("name", WEIGHTS)
def test_learned_is_valid_and_never_worse_than_a_fixed_pair(name, fmt, group_size, calibrated):
    weight = WEIGHTS[name](9, 168)  # the last group is partial in both formats
    statistics = random_statistics(168) if calibrated else None
    config = AAACConfig(format=fmt, group_size=group_size)
    learned = encode(weight, config, statistics)
    check_encoding(weight, learned, config, statistics)
    importance = importance_of(statistics, 168)
    error = weighted_error(weight, learned, group_size, importance)
    for other in FIXED_CODEBOOKS:
        config = AAACConfig(format=fmt, group_size=group_size, codebooks=other)
        fixed = encode(weight, config, statistics)
        check_encoding(weight, fixed, config, statistics)
        other_error = weighted_error(weight, fixed, group_size, importance)
        assert error <= other_error + 2 * rounding(other_error, weight, importance), other


# fixed grids without search: round-to-nearest


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@all_formats
@pytest.mark.parametrize("name", FIXED_CODEBOOKS)
def test_fixed_without_search_is_round_to_nearest(name, fmt, group_size, calibrated):
    """Rounded absmax / top as scale, nearest codes, the book of less plain error: data changes nothing."""
    weight = torch.randn(7, 300) * torch.logspace(-1, 1, 7)[:, None]
    config = AAACConfig(format=fmt, group_size=group_size, codebooks=name, scale_search=False)
    encoding = encode(weight, config, random_statistics(300) if calibrated else None)

    top = top_of(name)
    target = cut(weight.abs(), group_size).amax(-1) / top
    if fmt == "nvfp4":
        expected = float(weight.abs().max()) / (top * 448)
        assert encoding.per_tensor_scale.item() == pytest.approx(expected, rel=1e-6)
    values = storable(fmt, encoding)
    scale = encoding.scale.double()
    best = nearest_of(target, values)
    assert ((scale - target).abs() <= (best - target).abs() + 1e-6 * target).all()
    assert torch.isin(scale, values).all()

    pair = fixed_codebooks(name, group_size)
    assert torch.equal(encoding.codebooks, pair.sort(dim=1).values)
    errors = best_group_errors(weight, scale, pair, group_size, torch.ones(300))
    unlike = (errors[0] - errors[1]).abs() > 1e-4 * errors.amax(0)
    assert torch.equal(encoding.selector[unlike], (errors[1] < errors[0])[unlike])
    if torch.equal(pair[0], pair[1]):
        assert not encoding.selector.any()
    q = cut(dequantised(encoding, group_size), group_size)
    actual = (q - cut(weight, group_size)).square().sum(-1)
    torch.testing.assert_close(actual, errors.amin(0), rtol=1e-4, atol=0)


def test_int4_without_search_never_uses_minus_8():
    encoding = encode(torch.randn(16, 256), AAACConfig(codebooks="int4", scale_search=False))
    assert encoding.codes.min() >= 1


def test_if4_and_bof4_s_use_both_books():
    for name in ("if4", "bof4-s"):
        encoding = encode(torch.randn(16, 256), AAACConfig(group_size=32, codebooks=name, scale_search=False))
        assert 0.1 < encoding.selector.float().mean() < 0.9


def test_bof4_s_maps_the_signed_largest_weight_to_one():
    """A group whose largest weight is negative mostly takes the mirrored book."""
    weight = torch.randn(64, 256)
    encoding = encode(weight, AAACConfig(group_size=32, codebooks="bof4-s", scale_search=False))
    groups = cut(weight, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    assert (encoding.selector == (largest < 0)).float().mean() > 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_round_to_nearest_equals_torchao(dtype):
    if dtype == torch.bfloat16 and torchao_version() < (0, 18):
        pytest.skip("torchao before 0.18 takes the scales of bf16 weights in bf16")
    """Peer: torchao's NVFP4Tensor.

    Two differences by definition: torchao's smallest scale is the normal 2^-6, ours the subnormal 2^-9; and a weight
    halfway between two levels goes to the even code there, to the lower level here.
    """
    weight = (torch.randn(24, 256) * torch.logspace(-1.5, 0, 24)[:, None]).to(dtype)
    pts = per_tensor_amax_to_scale(weight.abs().max().float())
    peer = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=pts)
    ours = encode(weight, AAACConfig(format="nvfp4", codebooks="fp4", scale_search=False))
    torch.testing.assert_close(ours.per_tensor_scale, pts)
    scale = peer.scale.view(24, 16).float() * pts
    assert (scale > 2.0**-6 * pts).all()
    torch.testing.assert_close(ours.scale, scale, rtol=1e-6, atol=0)

    q, peer_q = dequantised(ours, 16), peer.dequantize(torch.float32).double()
    same = torch.isclose(q, peer_q, rtol=1e-5, atol=0)
    halfway = torch.isclose((q - weight).abs(), (peer_q - weight).abs(), rtol=1e-3)
    assert (same | halfway).all()
    assert same.float().mean() > 0.95


def test_nvfp4_groups_under_torchaos_smallest_scale_are_finer_here():
    weight = torch.randn(8, 64) * 1e-6
    weight[0] *= 1e6 / 0.4
    pts = per_tensor_amax_to_scale(weight.abs().max())
    peer = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=pts).dequantize(torch.float32).double()
    ours = dequantised(encode(weight, AAACConfig(format="nvfp4", codebooks="fp4", scale_search=False)), 16)
    assert (ours - weight)[1:].norm() <= (peer - weight)[1:].norm()
    torch.testing.assert_close(ours[0], peer[0], rtol=1e-5, atol=0)


# search and learned books


@both_formats
@pytest.mark.parametrize("name", WEIGHTS)
def test_lower_bounds_are_below_the_errors_of_fixed_pairs(name, fmt, group_size):
    """For any weight; near enough to spare most trials where weights are like a model's."""
    weight, statistics = WEIGHTS[name](9, 168), random_statistics(168)
    kwargs = {"format": fmt, "group_size": group_size}
    groups, config = ENCODE._Groups(weight, group_size), AAACConfig(**kwargs)
    importance = ENCODE._importance(weight, config, statistics)
    bounds = ENCODE._lower_bounds(groups.chunks(), groups.amax, importance, config, ENCODE._fixed_pairs(config))
    errors = [encode(weight, AAACConfig(**kwargs, codebooks=name), statistics).error for name in FIXED_CODEBOOKS]
    assert all(bound <= error for bound, error in zip(bounds, errors, strict=True))
    if name == "gaussian":  # one channel of large importance can spoil one pair
        shares = sorted(bound / float(error) for bound, error in zip(bounds, errors, strict=True))
        assert shares[len(shares) // 2] > 0.85


def test_learned_books_may_lose_to_a_fixed_pair():
    """Weights on INT4's grid, where k-means from NF4 does not end: the fixed pair stands in."""
    weight = torch.randint(-7, 8, (32, 64)).float()
    weight[:, ::32] = 7
    encoding = encode(weight, AAACConfig(group_size=32))
    assert encoding.error == 0


def search_slack(error, weight, importance, group_size: int, fmt: str):
    """How far a group's error may be off if the search misreads every weight: the triangle inequality, fp64."""
    # half of one of 4096 bins over twice a group's unit, which is less than twice its largest magnitude
    w = cut(weight.abs(), group_size)
    misread = w.amax(-1, keepdim=True) / 2048 + (w * 2.0**-8 if fmt == "int4" else 0)  # bf16 scales are rounded later
    distance = 2 * (misread.square() * cut(importance, group_size)).sum(-1).sqrt()
    return 2 * distance * error.sqrt() + distance.square()


@all_formats
@pytest.mark.parametrize("name", FIXED_CODEBOOKS)
def test_search_is_never_worse_than_no_search(name, fmt, group_size):
    """Group by group; the search reads errors off a table, hence the slack."""
    weight, statistics = torch.randn(8, 256) * torch.logspace(-2, 2, 8)[:, None], random_statistics(256)
    importance = importance_of(statistics, 256)
    errors = []
    for scale_search in (True, False):
        config = AAACConfig(format=fmt, group_size=group_size, codebooks=name, scale_search=scale_search)
        encoding = encode(weight, config, statistics)
        squared = (weight.double() - dequantised(encoding, group_size)).square()
        errors.append(cut(squared * importance, group_size).sum(-1))
    searched, plain = errors
    slack = search_slack(plain, weight, importance, group_size, fmt)
    assert (searched <= plain + slack).all()
    assert searched.sum() < plain.sum()


def searched(groups, importance, fmt, books, top, amax):
    """The scales that the search chooses, as they are stored."""
    scale = search_scales(groups, importance, ScaleTable(books / top, fmt), fmt.per_tensor_scale(amax, 1.0))
    return fmt.round(scale / top, fmt.per_tensor_scale(amax, top))


@pytest.mark.parametrize("name", ["if4", "bof4-s"])
@both_formats
def test_search_finds_the_best_candidate(fmt, group_size, name):
    """Exhaustively: every candidate scale, both books, every entry."""
    weight, h = torch.randn(24, 128), (torch.randn(128) * 2).exp()
    fmt, top = FORMATS[fmt], top_of(name)
    books = fixed_codebooks(name, group_size).sort(dim=1).values
    groups, amax = weight.view(24, -1, group_size), weight.abs().max()
    start, pts = groups.abs().amax(-1) / top, fmt.per_tensor_scale(amax, top)
    found = searched(groups, h.view(-1, group_size), fmt, books, top, amax)
    if pts is None:
        candidates = [fmt.round(groups.abs().amax(-1) * ratio / top, None) for ratio in BF16_RATIOS]
        assert (found == torch.stack(candidates)).any(0).all()
    else:  # every code in the range
        candidates = [fmt.round(start * ratio, pts) for ratio in torch.linspace(0.67, 1.6, 40)]
        assert torch.equal(fmt.round(found, pts), found)
    assert (found > 0.61 * start).all()
    errors = torch.stack([best_group_errors(weight, c, books, group_size, h).amin(0) for c in candidates])
    best, actual = errors.amin(0), best_group_errors(weight, found, books, group_size, h).amin(0)
    assert (actual <= best + search_slack(best, weight, h, group_size, fmt.name)).all()
    assert (actual / best).median() < 1.001
    assert actual.sum() < 1.05 * best.sum()  # one weight of large importance may miss by the rounding of its scale


@both_formats
def test_search_counts_what_a_scale_clips(fmt, group_size):
    """A single far entry: scales under which the weights lie on it and beyond, none of which is read as perfect."""
    books, fmt = torch.full((2, 16), 1.5), FORMATS[fmt]
    groups, amax = torch.full((1, 1, group_size), 10.0), torch.tensor(10.0)
    found = searched(groups, torch.ones(1, group_size), fmt, books, 1.0, amax)
    assert (found * 1.5 - 10).abs() < 0.07 * 10


def test_the_largest_magnitude_itself_is_a_candidate():
    """Weights that lie on a grid stay there: round-to-nearest's scale is among those tried."""
    assert 1.0 in BF16_RATIOS
    assert 1.0 in E4M3_RATIOS
    for fmt, group_size, name in (("int4", 32, "int4"), ("nvfp4", 16, "fp4")):
        entries = fixed_codebooks(name, group_size)[0, 1:]
        weight = entries[torch.randint(len(entries), (8, 64))]
        weight[:, ::group_size] = entries.max()
        weight *= 2.0 ** torch.randint(-2, 3, (8, 1))
        assert encode(weight, AAACConfig(format=fmt, group_size=group_size, codebooks=name)).error == 0


@pytest.mark.parametrize("scale_search", [True, False])
@all_formats
def test_learned_is_clearly_better_than_round_to_nearest(fmt, group_size, scale_search):
    """Measured 0.50 to 0.62 with the search; a quarter off without it."""
    weight = torch.randn(64, 512)
    grid = FORMATS[fmt].grid
    kwargs = {"format": fmt, "group_size": group_size, "scale_search": scale_search}
    rtn = encode(weight, AAACConfig(format=fmt, group_size=group_size, codebooks=grid, scale_search=False))
    assert encode(weight, AAACConfig(**kwargs)).error < (0.7 if scale_search else 0.8) * rtn.error


def test_learned_recovers_a_hidden_codebook():
    """Weights that lie on 16 levels near the start of k-means are exact up to the books' bf16."""
    levels = learned_start()[0]
    levels[1:-1] += 0.04 * torch.rand(14) - 0.02
    weight = levels[torch.randint(16, (64, 256))]
    weight[:, ::32] = -1.0
    encoding = encode(weight, AAACConfig(group_size=32))
    assert encoding.error < 1e-5 * weight.double().square().sum()


@both_formats
def test_statistics_lower_the_weighted_error(fmt, group_size):
    weight, statistics = torch.randn(32, 256), random_statistics(256)
    config = AAACConfig(format=fmt, group_size=group_size)
    importance = importance_of(statistics, 256)
    aware = weighted_error(weight, encode(weight, config, statistics), group_size, importance)
    blind = weighted_error(weight, encode(weight, config), group_size, importance)
    assert aware < 0.9 * blind


@both_formats
def test_refining_books_and_scales_together_pays(fmt, group_size, monkeypatch):
    """Summed over six layers: 3 to 5 % less error, of which a single layer may show a half."""
    config, layers = AAACConfig(fmt, group_size), [(torch.randn(64, 256), random_statistics(256)) for _ in range(6)]
    refined = sum(encode(weight, config, statistics).error for weight, statistics in layers)
    monkeypatch.setattr(ENCODE, "REFINE_ROUNDS", 0)
    assert refined < sum(encode(weight, config, statistics).error for weight, statistics in layers)


def test_more_iterations_do_not_hurt():
    weight, statistics = torch.randn(64, 256), random_statistics(256)
    first, last = (
        encode(weight, AAACConfig(group_size=32, scale_search=False, iterations=i), statistics).error for i in (1, 25)
    )
    assert last < first
