"""What the encoder's result may not depend on, what importance does, and what is rejected."""

import pytest
import torch
from encode_oracle import (
    ENCODE,
    all_formats,
    both_formats,
    check_encoding,
    dequantised,
    random_statistics,
)

from aaac_ao import AAACConfig, Statistics
from aaac_ao.encode import encode

# shapes, chunks, samples, repetition


@pytest.mark.parametrize("codebooks", ["learned", "if4"])
@pytest.mark.parametrize("columns_over", [0, 1, -1])
@all_formats
def test_one_group_and_ragged_groups(fmt, group_size, columns_over, codebooks):
    """K equal to a group, one column more, and one column less than two groups."""
    k = group_size + columns_over if columns_over >= 0 else 2 * group_size - 1
    weight, statistics = torch.randn(5, k), random_statistics(k)
    config = AAACConfig(format=fmt, group_size=group_size, codebooks=codebooks)
    check_encoding(weight, encode(weight, config, statistics), config, statistics)


def test_whole_groups_do_not_depend_on_a_partial_one():
    """Fixed books with bf16 scales: every group is on its own."""
    weight, config = torch.randn(5, 70), AAACConfig(group_size=32, codebooks="if4")
    ragged, whole = encode(weight, config), encode(weight[:, :64], config)
    assert torch.equal(ragged.codes[:, :64], whole.codes)
    assert torch.equal(ragged.scale[:, :2], whole.scale)


def assert_same(a, b):
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.selector, b.selector)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.codebooks, b.codebooks)
    assert (a.per_tensor_scale is None) == (b.per_tensor_scale is None)
    if a.per_tensor_scale is not None:
        assert torch.equal(a.per_tensor_scale, b.per_tensor_scale)


@pytest.mark.parametrize("chunk", [1, 1000, 3333])
@both_formats
def test_chunks_do_not_show(fmt, group_size, chunk, monkeypatch):
    weight, statistics, config = torch.randn(23, 200), random_statistics(200), AAACConfig(fmt, group_size)
    whole = encode(weight, config, statistics)
    monkeypatch.setattr(ENCODE, "CHUNK_WEIGHTS", chunk)
    parts = encode(weight, config, statistics)
    assert_same(whole, parts)
    torch.testing.assert_close(whole.error, parts.error, rtol=1e-12, atol=0)


@both_formats
def test_books_learned_on_a_sample_serve_the_whole(fmt, group_size, monkeypatch):
    weight, statistics, config = torch.randn(96, 200), random_statistics(200), AAACConfig(fmt, group_size)
    whole = encode(weight, config, statistics)
    monkeypatch.setattr(ENCODE, "SAMPLE_WEIGHTS", 96 * 200 // 4)
    sampled = encode(weight, config, statistics)
    check_encoding(weight, sampled, config, statistics)
    assert not torch.equal(sampled.codebooks, whole.codebooks)
    assert sampled.error < 1.15 * whole.error


def test_a_sample_of_zeros_leaves_a_valid_result(monkeypatch):
    """Every sampled row is zero: k-means has no mass to move entries with."""
    weight, config = torch.randn(16, 64), AAACConfig(group_size=32)
    weight[::4] = 0
    monkeypatch.setattr(ENCODE, "SAMPLE_WEIGHTS", 16 * 64 // 4)
    check_encoding(weight, encode(weight, config), config)


@both_formats
def test_encoding_twice_is_bitwise_equal(fmt, group_size):
    weight, statistics, config = torch.randn(40, 200), random_statistics(200), AAACConfig(fmt, group_size)
    kept, moment = weight.clone(), statistics.second_moment.clone()
    first, second = (encode(weight, config, statistics) for _ in range(2))
    assert_same(first, second)
    assert torch.equal(first.error, second.error)
    assert torch.equal(weight, kept)
    assert torch.equal(statistics.second_moment, moment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_encode_like_their_fp32_values(dtype):
    weight, statistics, config = torch.randn(9, 160).to(dtype), random_statistics(160), AAACConfig("nvfp4")
    assert_same(encode(weight, config, statistics), encode(weight.float(), config, statistics))


def test_strides_and_autograd_do_not_show():
    weight, config = torch.randn(160, 9), AAACConfig()
    plain = encode(weight.t().contiguous(), config)
    assert_same(plain, encode(weight.t(), config))
    trained = encode(torch.nn.Parameter(weight.t()), config)
    assert_same(plain, trained)
    assert not any(x.requires_grad for x in (trained.error, trained.scale, trained.codebooks))


@both_formats
def test_a_power_of_two_on_the_weight_is_a_power_of_two_on_the_scale(fmt, group_size):
    """From 2^-100 to 2^100: the squares of such scales leave the range of fp32."""
    weight, config = torch.randn(9, 160), AAACConfig(fmt, group_size)
    expected = encode(weight, config)
    for power in (-100, 100):
        actual = encode(weight * 2.0**power, config)
        assert torch.equal(actual.codes, expected.codes)
        assert torch.equal(actual.scale, expected.scale * 2.0**power)
        torch.testing.assert_close(actual.error, expected.error * 4.0**power, rtol=1e-9, atol=0)


# importance


@pytest.mark.parametrize("power", [-30, 24])
@both_formats
def test_the_unit_of_the_importance_does_not_matter(fmt, group_size, power):
    weight, statistics, config = torch.randn(9, 160), random_statistics(160), AAACConfig(fmt, group_size)
    scaled = Statistics(statistics.second_moment * 2.0**power, 7)
    a, b = encode(weight, config, statistics), encode(weight, config, scaled)
    assert_same(a, b)
    torch.testing.assert_close(b.error, a.error * 2.0**power, rtol=1e-12, atol=0)


def test_equal_importance_is_no_importance():
    weight, config = torch.randn(9, 160), AAACConfig(group_size=32)
    flat, free = encode(weight, config, Statistics(torch.full((160,), 3.7), 1)), encode(weight, config)
    torch.testing.assert_close(flat.error, free.error * 3.7 * 1.001, rtol=1e-3, atol=0)


@both_formats
def test_channels_that_were_never_active_keep_sensible_codes(fmt, group_size):
    weight, h = torch.randn(32, 160), torch.rand(160) + 0.5
    h[::2] = 0
    h[:group_size] = 0  # a whole group of them
    config, statistics = AAACConfig(fmt, group_size), Statistics(h, 5)
    encoding = encode(weight, config, statistics)
    check_encoding(weight, encoding, config, statistics)
    silent = h == 0
    error = (dequantised(encoding, group_size) - weight)[:, silent].square().sum()
    assert error < 0.03 * weight[:, silent].square().sum()


def test_no_active_channel_at_all_is_like_no_statistics():
    weight, config = torch.randn(9, 160), AAACConfig(group_size=32)
    assert_same(encode(weight, config, Statistics(torch.zeros(160), 5)), encode(weight, config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moments_of_any_float_dtype(dtype):
    weight, moment, config = torch.randn(9, 160), random_statistics(160).second_moment.to(dtype), AAACConfig()
    assert_same(
        encode(weight, config, Statistics(moment, 3)),
        encode(weight, config, Statistics(moment.float(), 3)),
    )


# what is rejected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codebooks", ["learned", "int4"])
def test_weights_that_are_not_finite_are_rejected(bad, codebooks):
    weight = torch.randn(4, 128)
    weight[2, 77] = weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"\[4, 128\] has 2 NaN or infinite"):
        encode(weight, AAACConfig(codebooks=codebooks))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_not_floats_are_rejected(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        encode(torch.ones(4, 128, dtype=dtype), AAACConfig())


@pytest.mark.parametrize("shape", [(128,), (2, 4, 128), (0, 128), (4, 0), ()])
def test_weights_that_are_not_matrices_are_rejected(shape):
    with pytest.raises(ValueError, match="2-D") as error:
        encode(torch.ones(shape), AAACConfig())
    assert str(list(shape)) in str(error.value)


def test_weights_on_meta_are_rejected():
    with pytest.raises(ValueError, match="meta"):
        encode(torch.ones(4, 128, device="meta"), AAACConfig())


@all_formats
def test_weights_narrower_than_a_group_are_rejected(fmt, group_size):
    with pytest.raises(ValueError, match=f"in_features {group_size - 1} .* group_size {group_size}"):
        encode(torch.ones(4, group_size - 1), AAACConfig(fmt, group_size))


@pytest.mark.parametrize("codebooks", ["learned", "fp4"])
@pytest.mark.parametrize("shape", [(127,), (129,), (1, 128), (128, 1), (128, 128), ()])
def test_moments_of_another_shape_are_rejected(shape, codebooks):
    with pytest.raises(ValueError, match=r"\[128\]") as error:
        encode(torch.randn(4, 128), AAACConfig(codebooks=codebooks), Statistics(torch.ones(shape), 1))
    assert str(list(shape)) in str(error.value)


def test_statistics_without_a_token_are_rejected():
    with pytest.raises(ValueError, match="no token"):
        encode(torch.randn(4, 128), AAACConfig(), Statistics(torch.zeros(128), 0))


@pytest.mark.parametrize("bad", [-1e-6, float("nan"), float("inf")])
def test_impossible_moments_are_rejected(bad):
    moment = torch.ones(128)
    moment[9] = bad
    with pytest.raises(ValueError, match="second_moment"):
        encode(torch.randn(4, 128), AAACConfig(), Statistics(moment, 1))
