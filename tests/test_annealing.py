"""Annealing of codes: against exhaustive search, against plain PyTorch, and what it must never do."""

import importlib.util
import itertools
import pathlib

import pytest
import torch
from interpreter import run_in_interpreter
from test_rounding import ISAS

from aaac_ao import AAACConfig, Statistics
from aaac_ao.encode import annealing, encode
from aaac_ao.encode.annealing import anneal, noise, offsets, sweep_columns, sweeps_of
from aaac_ao.encode.grid import Grid
from aaac_ao.kernels import cpu
from aaac_ao.kernels.cpu import rounding as compiled

HELPER = pathlib.Path(__file__).with_name("annealing_in_interpreter.py")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_library = pytest.mark.skipif(compiled.library() is None, reason="the package was installed without a compiler")


def problem(columns: int, rows: int, group_size: int, entries: int = 16):
    """Weights, a Hessian with strong correlations, a grid, and codes; `entries` of a book differ."""
    mixing = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    x = torch.randn(3 * columns + 20, columns) @ mixing
    groups = -(-columns // group_size)
    books = torch.linspace(-1, 1, 16) * torch.tensor([[1.0], [0.7]]) + 0.02 * torch.randn(2, 16)
    books[:, entries:] = 1e6 + torch.arange(16 - entries)
    scale, selector = torch.rand(groups, rows) * 2 + 1, torch.randint(0, 2, (groups, rows), dtype=torch.uint8)
    grid = Grid(scale, selector, books.sort(dim=1).values, group_size)
    codes = torch.randint(0, entries, (columns, rows), dtype=torch.uint8)
    return torch.randn(columns, rows), x.T @ x / len(x), grid, codes


def errors_of(weight, hessian, grid, codes) -> torch.Tensor:
    """(w_n - q_n)^T H (w_n - q_n) of every row, fp64."""
    error = grid.values(codes).double() - weight.double()
    return ((hessian.double() @ error) * error).sum(0)


def parts_of(weight, hessian, grid, codes, sweeps: int) -> list:
    """What a kernel is called with."""
    values = grid.values(codes)
    pull, pushes = hessian @ (values - weight), noise(sweeps, len(weight), weight.device)
    parts = [values, codes.clone(), pull, hessian, pushes, torch.rand(codes.shape[1])]
    return [*parts, grid.codebooks, grid.scale, grid.selector, offsets(weight), grid.group_size]


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("columns", "rows", "group_size"), [(40, 21, 16), (64, 13, 32), (7, 50, 64), (1, 7, 16)])
def test_the_kernel_does_what_pytorch_does(columns, rows, group_size, isa, monkeypatch):
    monkeypatch.setattr(cpu, "best_isa", lambda: isa)
    weight, hessian, grid, codes = problem(columns, rows, group_size)
    parts = parts_of(weight, hessian, grid, codes, 12)
    other = [part.clone() if isinstance(part, torch.Tensor) else part for part in parts]
    grew, expected = compiled.anneal(*parts), sweep_columns(*other)
    same = (parts[1] == other[1]).all(0)
    assert same.double().mean() > 0.8  # one code at a tie changes what follows in its row
    assert torch.allclose(grew[same], expected[same], rtol=1e-3, atol=1e-3)
    for values, codes_now, pull, *_ in (parts, other):
        assert torch.equal(values, grid.values(codes_now))
        assert torch.allclose(pull, hessian @ (values - weight), rtol=1e-3, atol=1e-3)
    before = errors_of(weight, hessian, grid, codes)
    assert torch.allclose(before + grew.double(), errors_of(weight, hessian, grid, parts[1]), rtol=1e-3, atol=1e-3)


@needs_library
def test_no_row_is_worse_and_most_are_better_than_descent_leaves_them():
    weight, hessian, grid, codes = problem(60, 100, 32)
    parts = parts_of(weight, hessian, grid, codes, 20)
    parts[5] = torch.zeros(100)
    compiled.anneal(*parts)  # without noise: coordinate descent, to where it stops
    settled = parts[1]
    before = errors_of(weight, hessian, grid, settled)
    after = errors_of(weight, hessian, grid, anneal(weight, hessian, grid, settled))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert (after < 0.999 * before).double().mean() > 0.7
    assert after.sum() < 0.97 * before.sum()


@needs_library
def test_small_rows_come_to_the_best_of_all_codes():
    entries, columns = 6, 5
    weight, hessian, grid, codes = problem(columns, 60, 16, entries)
    every = torch.tensor(list(itertools.product(range(entries), repeat=columns)), dtype=torch.uint8)
    best = torch.empty(60, dtype=torch.float64)
    for row in range(60):
        own = Grid(grid.scale[:, [row]], grid.selector[:, [row]], grid.codebooks, 16)
        all_of = Grid(*(part.expand(-1, len(every)) for part in (own.scale, own.selector)), grid.codebooks, 16)
        best[row] = errors_of(weight[:, [row]], hessian, all_of, every.T).min()
    found = errors_of(weight, hessian, grid, anneal(weight, hessian, grid, codes, 300))
    assert bool((found >= best * (1 - 1e-6)).all())
    assert (found < best * (1 + 1e-4)).double().mean() > 0.8


@needs_library
def test_the_same_for_any_number_of_threads():
    weight, hessian, grid, codes = problem(50, 83, 16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            parts = parts_of(weight, hessian, grid, codes, 9)
            parts[2], parts[5] = torch.zeros(50, 83), torch.full((83,), 0.5)
            results.append((compiled.anneal(*parts), *parts[:3]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@needs_library
def test_zero_rows_and_scales_stay():
    weight, hessian, grid, codes = problem(30, 8, 16)
    weight[:, 2], grid.scale[:, 2], grid.scale[0, 5] = 0, 0, 1e-40
    new = anneal(weight, hessian, grid, codes)
    assert new.max() < 16
    assert bool((errors_of(weight, hessian, grid, new) <= errors_of(weight, hessian, grid, codes) * (1 + 1e-5)).all())


def test_without_a_kernel_nothing_changes(monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: None)
    weight, hessian, grid, codes = problem(30, 8, 16)
    assert torch.equal(anneal(weight, hessian, grid, codes), codes)


@needs_library
@pytest.mark.parametrize("config", [{"format": "nvfp4"}, {"group_size": 32}], ids=["nvfp4", "int4"])
def test_a_layer_gains_from_it(config, monkeypatch):
    config = AAACConfig(**config, rounding="gptq-thorough")
    x = torch.randn(600, 96) @ (torch.eye(96) + 0.5 * torch.randn(96, 96) / 96**0.5)
    hessian = x.T @ x / len(x)
    known = Statistics(second_moment=hessian.diagonal().clone(), tokens=len(x), hessian=hessian)
    weight = torch.randn(64, 96)
    with_it = encode(weight, config, known).error
    monkeypatch.setattr(annealing, "_kernel", lambda *of: None)
    assert with_it < 0.99 * encode(weight, config, known).error


def test_fewer_sweeps_of_wide_rows():
    assert sweeps_of(1) == sweeps_of(128) == annealing.MOST_SWEEPS
    assert sweeps_of(512) > sweeps_of(1024) > sweeps_of(8192) == annealing.LEAST_SWEEPS


def test_noise_is_even_and_fades():
    drawn = noise(102, 500, torch.device("cpu"))
    assert drawn.abs().max() <= 1
    assert abs(drawn.mean()) < 0.02
    fading = drawn[:100].square().mean(1) - (1 - torch.arange(100) / 100) / 3  # evenly, in mean squares
    assert fading.abs().max() < 0.1
    assert not drawn[-annealing.COLD_SWEEPS :].any()
    assert drawn[0].unique().numel() > 490
    assert torch.equal(noise(102, 500, torch.device("cpu")), drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_read_the_noise_from_different_places(dtype):
    weight = torch.randn(256, 300).to(dtype).float()
    places = offsets(weight)
    assert 0 <= places.min() <= places.max() < 256
    assert places.unique().numel() > 100
    assert torch.equal(offsets(weight[:, 7:20]), places[7:20])


@needs_library
@pytest.mark.parametrize("index", range(10))
def test_parts_that_do_not_fit_are_rejected(index):
    parts = parts_of(*problem(20, 6, 16), 3)
    for wrong in (parts[index].double(), parts[index][None]):
        with pytest.raises(ValueError, match=r"must be|contiguous"):
            compiled.anneal(*parts[:index], wrong, *parts[index + 1 :])


@needs_library
def test_offsets_must_be_columns():
    parts = parts_of(*problem(20, 6, 16), 3)
    for wrong in (20, -1):
        parts[9][3] = wrong
        with pytest.raises(ValueError, match="from 0 to 19"):
            compiled.anneal(*parts)


@needs_library
def test_outputs_must_be_contiguous():
    parts = parts_of(*problem(20, 6, 16), 3)
    parts[2] = parts[2].t().contiguous().t()
    with pytest.raises(ValueError, match="contiguous"):
        compiled.anneal(*parts)


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return run_in_interpreter(HELPER)


@needs_triton
@pytest.mark.parametrize("kind", ["codes", "growth", "values", "pull", "again", "check"])
def test_the_gpu_kernel_is_plain_annealing(results, kind):
    mine = [r for r in results if r["kind"] == kind]
    assert mine
    assert not [r for r in mine if not r["ratio"] <= 1]


@needs_triton
def test_damages_are_noticed(results):
    mine = [r for r in results if r["kind"] == "broken"]
    assert len(mine) == 9
    assert not [r for r in mine if not r["ratio"] > 1]


@needs_triton
def test_the_gpu_binding_rejects_what_does_not_fit():
    from aaac_ao.kernels import annealing as kernel

    parts = parts_of(*problem(20, 6, 16), 3)
    for index in range(10):
        with pytest.raises(ValueError, match="must be"):
            kernel.anneal(*parts[:index], parts[index].double(), *parts[index + 1 :])
    with pytest.raises(ValueError, match="group_size"):
        kernel.anneal(*parts[:10], 512)


@needs_triton
def test_a_gpu_kernel_that_differs_or_fails_is_not_used(monkeypatch):
    from aaac_ao.kernels import annealing as kernel
    from aaac_ao.kernels import verify

    monkeypatch.setattr(verify, "fast_is_right", lambda variant, _, both: verify._compare(variant, both))
    broken = lambda *parts: sweep_columns(*parts[:5], 0 * parts[5], *parts[6:])  # noqa: E731
    for run, right in ((sweep_columns, True), (broken, False), (None, False)):
        monkeypatch.setattr(kernel, "anneal", run)
        assert annealing._is_right(kernel, torch.device("cpu"), 20, 16) == right


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("columns", "group_size"), [(600, 16), (300, 128), (64, 64)])
def test_the_gpu_anneals_as_well_as_pytorch(columns, group_size, caplog):
    run = annealing._kernel(torch.device("cuda"), columns, group_size)
    error, expected = annealing.errors_of_both(run, torch.device("cuda"), columns, group_size)
    assert torch.allclose(error, expected, rtol=0.01)
    assert not caplog.records
