"""Scale formats against exhaustive search over the values that their dtypes hold."""

import pytest
import torch
from encode_oracle import POSITIVE_BF16, POSITIVE_E4M3, nearest_of

from aaac_ao.formats import FORMATS, load_scale, selector_bit

INT4, NVFP4 = FORMATS["int4"], FORMATS["nvfp4"]
DTYPES = [torch.bfloat16, torch.float8_e4m3fn]


def random_scales(*shape: int, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(*shape) * spread).exp()


def tensor_scale() -> torch.Tensor:
    return random_scales(1, spread=5.0).squeeze(0)


def as_near(actual: torch.Tensor, best: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether `actual` is as close to `target` as `best`, up to fp32 rounding of the target."""
    return bool(((actual - target).abs() <= (best - target).abs() + 1e-6 * target.abs()).all())


def test_there_are_126_positive_e4m3_values():
    assert (POSITIVE_E4M3.diff() > 0).all()
    assert (POSITIVE_E4M3[0], POSITIVE_E4M3[-1]) == (2.0**-9, 448.0)


def test_bf16_scales_round_to_the_nearest():
    scale = torch.cat([random_scales(100, spread=4.0), random_scales(20) * 1e-30, random_scales(20) * 1e30])
    rounded = INT4.round(scale, None)
    assert as_near(rounded.double(), nearest_of(scale, POSITIVE_BF16), scale.double())
    assert torch.isin(rounded.double(), POSITIVE_BF16).all()


def test_bf16_scales_stay_finite():
    assert INT4.round(torch.tensor([3.4e38]), None).item() == torch.finfo(torch.bfloat16).max


def test_e4m3_scales_round_to_the_nearest():
    """Over and between all codes, below the smallest and beyond the largest."""
    pts = tensor_scale()
    between = POSITIVE_E4M3[:-1] + POSITIVE_E4M3.diff() * torch.rand(8, 125, dtype=torch.float64)
    target = torch.cat([between.flatten(), POSITIVE_E4M3, 2.0**-9 * torch.rand(20) + 1e-9, 448 + 1e6 * torch.rand(20)])
    scale = (target * pts.double()).float()
    target = scale.double() / pts.double()
    code = NVFP4.round(scale, pts).double() / pts.double()
    assert as_near(code, nearest_of(target, POSITIVE_E4M3), target)
    assert as_near(code, nearest_of(code, POSITIVE_E4M3), code)


def test_e4m3_saturates():
    pts = tensor_scale()
    torch.testing.assert_close(NVFP4.round(1e6 * pts, pts), 448 * pts)
    torch.testing.assert_close(NVFP4.round(1e-6 * pts, pts), 2.0**-9 * pts)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_zero_stays_zero(fmt):
    zero, pts = torch.zeros(3, 2), fmt.per_tensor_scale(torch.tensor(5.0), 6.0)
    assert not fmt.round(zero, pts).any()
    assert not fmt.neighbours(zero, pts, 3, 0.02).any()
    magnitude, selector = load_scale(fmt.store(zero, torch.ones(3, 2, dtype=torch.bool), pts))
    assert not magnitude.any()
    assert selector.all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_store_and_load_are_inverse(fmt):
    pts = tensor_scale() if fmt.has_per_tensor_scale else None
    unit = 1.0 if pts is None else pts
    scale = fmt.round(random_scales(37, 11) * unit, pts)
    scale[torch.rand(37, 11) < 0.2] = 0
    selector = torch.rand(37, 11) < 0.5
    stored = fmt.store(scale, selector, pts)
    magnitude, read = load_scale(stored)
    assert stored.dtype == fmt.scale_dtype
    assert magnitude.dtype == torch.float32
    torch.testing.assert_close(magnitude * unit, scale, rtol=0, atol=0)
    assert torch.equal(read, selector)


def test_every_e4m3_code_survives_any_per_tensor_scale():
    """Storing divides by the per-tensor scale again: fp32 rounding must never reach the neighbouring code."""
    for _ in range(200):
        pts = tensor_scale()
        scale = POSITIVE_E4M3.float() * pts
        for rounded in (scale, NVFP4.round(scale, pts)):
            stored = NVFP4.store(rounded, torch.zeros(126, dtype=torch.bool), pts)
            assert torch.equal(stored.double(), POSITIVE_E4M3), pts


@pytest.mark.parametrize("dtype", DTYPES)
def test_selector_is_the_sign_bit(dtype):
    stored = torch.tensor([0.0, -0.0, 1.5, -1.5, 448.0, -448.0, 2.0**-9, -(2.0**-9)]).to(dtype)
    assert selector_bit(stored).tolist() == [False, True] * 4
    assert load_scale(stored)[0].tolist() == [0, 0, 1.5, 1.5, 448, 448, 2.0**-9, 2.0**-9]


def test_bf16_neighbours_are_storable_and_near():
    scale = INT4.round(random_scales(50), None)
    neighbours = INT4.neighbours(scale, None, 4, 0.03)
    assert torch.isin(neighbours.double(), POSITIVE_BF16).all()
    steps = torch.arange(-4, 5)[:, None]
    assert ((neighbours / scale - 1 - 0.03 * steps).abs() < 1.13 * 2**-8).all()
    assert torch.equal(neighbours[4], scale)


def test_e4m3_neighbours_are_the_codes_beside():
    pts = tensor_scale()
    scale = POSITIVE_E4M3.float() * pts
    neighbours = NVFP4.neighbours(scale, pts, 3, 0.02).double() / pts.double()
    for i in range(126):
        tried = nearest_of(neighbours[:, i], POSITIVE_E4M3)
        torch.testing.assert_close(neighbours[:, i], tried, rtol=1e-6, atol=0)
        assert set(tried.tolist()) == set(POSITIVE_E4M3[max(0, i - 3) : i + 4].tolist())


@pytest.mark.parametrize("largest", [448.0, 352.0])
def test_per_tensor_scale_maps_the_largest_group(largest):
    amax, top = random_scales(1).squeeze(0), 6.0
    pts = NVFP4.per_tensor_scale(amax, top, largest)
    stored = NVFP4.store(NVFP4.round(amax / top, pts), torch.tensor(False), pts)
    assert stored.float().item() == largest


def test_per_tensor_scale_of_zeros_is_one():
    assert NVFP4.per_tensor_scale(torch.tensor(0.0), 6.0).item() == 1.0


def test_only_nvfp4_has_a_per_tensor_scale():
    assert INT4.per_tensor_scale(torch.tensor(3.0), 7.0) is None
    assert (INT4.has_per_tensor_scale, NVFP4.has_per_tensor_scale) == (False, True)
