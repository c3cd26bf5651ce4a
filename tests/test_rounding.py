"""Rounding of a block: the compiled paths and PyTorch's against exhaustive search and against each other."""

import itertools
import logging

import pytest
import torch
from encode_oracle import upper_root

from aaac_ao import AAACConfig, Statistics
from aaac_ao.encode import annealing, encode, rounding
from aaac_ao.encode.rounding import BLOCK_COLUMNS, Metric, round_block
from aaac_ao.kernels import cpu
from aaac_ao.kernels.cpu import library
from aaac_ao.kernels.cpu import rounding as compiled

needs_library = pytest.mark.skipif(compiled.library() is None, reason="the package was installed without a compiler")

#: The encoder has no code of its own for AVX-VNNI.
ISAS = [isa for isa in cpu.isas() or ["plain"] if isa != "avx_vnni"]


@pytest.fixture(params=[*(pytest.param(isa, marks=needs_library) for isa in ISAS), "pytorch"])
def path(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(compiled, "library", lambda: None)
    else:
        monkeypatch.setattr(cpu, "best_isa", lambda: request.param)
    return request.param


def metric_of(columns: int) -> Metric:
    x = torch.randn(3 * columns + 20, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    x = x.double()  # mixing may be all but singular
    return Metric.of_factor(upper_root(x.T @ x / len(x)).float())


def block_of(rows: int, sizes: list[int], count: int):
    """A target, its metric, books, and candidates around the size of the target."""
    columns = sum(sizes)
    target = torch.randn(columns, rows) * torch.randn(rows).exp()
    books = torch.randn(2, 16).sort(dim=1).values
    scale = torch.stack([part.abs().amax(0) for part in target.split(sizes)])
    candidates = scale * torch.linspace(0.4, 1.2, count)[:, None, None]
    return target, metric_of(columns), sizes, books, candidates


def values_of(rounded, books, sizes) -> torch.Tensor:
    """What the codes stand for."""
    of_column = [group for group, size in enumerate(sizes) for _ in range(size)]
    return books.view(-1)[rounded.codes.long() + 16 * rounded.selector.long()[of_column]] * rounded.scale[of_column]


def errors_of(rounded, target, metric, sizes, books) -> torch.Tensor:
    """e^T M e of every row, fp64."""
    error = target.double() - values_of(rounded, books, sizes).double()
    return ((metric.matrix.double() @ error) * error).sum(0)


def test_both_paths_take_the_same_blocks():
    assert compiled.MOST_COLUMNS == BLOCK_COLUMNS


def test_metric_of_its_factor():
    metric = metric_of(30)
    factor = metric.factor.double()
    assert torch.equal(factor, factor.triu())
    assert torch.equal(metric.root, metric.root.tril())
    assert torch.allclose(torch.linalg.inv(factor.T @ factor), metric.matrix.double(), rtol=1e-3, atol=1e-3)
    assert torch.allclose(metric.root.double().T @ metric.root.double(), metric.matrix.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "sizes"), [(1, [16]), (37, [16, 16, 5]), (16, [64, 64]), (50, [128, 40])])
def test_what_comes_back_belongs_together(path, rows, sizes):
    target, metric, sizes, books, candidates = block_of(rows, sizes, 3)
    kept = target.clone()
    rounded = round_block(target, metric, sizes, books, candidates)
    assert torch.equal(target, kept)
    assert rounded.codes.max() < 16
    assert rounded.selector.max() <= 1
    assert (rounded.scale == candidates).any(0).all()
    assert torch.equal(rounded.values, values_of(rounded, books, sizes))
    errors = errors_of(rounded, target, metric, sizes, books)
    assert torch.allclose(rounded.errors.double().square().sum(0), errors, rtol=1e-3)


def test_a_single_column_is_exhaustive_search(path):
    """One group of one column: the scale, book and entry that are nearest."""
    target, metric, sizes, books, candidates = block_of(200, [1], 5)
    rounded = round_block(target, metric, sizes, books, candidates)
    values = (candidates[:, 0, None, None] * books[None, :, :, None]).flatten(0, 2)
    nearest = (values - target).abs().amin(0)
    assert torch.allclose((rounded.values[0] - target[0]).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_small_blocks_are_near_the_best_of_all_codes(path):
    """Two columns, one scale: all 512 choices of a book and two codes. Steps of one code get stuck if both go along."""
    pairs = torch.tensor(list(itertools.product(range(16), repeat=2)))
    found, best = [], []
    for correlation in torch.linspace(-0.8, 0.8, 9).tolist():
        target, _, sizes, books, candidates = block_of(60, [2], 1)
        metric = Metric.of_factor(upper_root(torch.tensor([[1.0, correlation], [correlation, 1.0]])))
        rounded = round_block(target, metric, sizes, books, candidates)
        values = torch.cat([book[pairs] for book in books]).double()  # [512, 2]
        error = target.double().T[:, None] - candidates[0, 0].double()[:, None, None] * values
        best.append(((error @ metric.matrix.double()) * error).sum(-1).amin(1))
        found.append(errors_of(rounded, target, metric, sizes, books))
    found, best = torch.cat(found), torch.cat(best)
    assert (found >= best * (1 - 1e-4)).all()
    assert found.sum() < 1.5 * best.sum()
    assert (found < best * (1 + 1e-3)).double().mean() > 0.85


@needs_library
@pytest.mark.parametrize("sweeps", [0, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_pytorch(isa, sweeps, monkeypatch):
    """On groups that are no multiples of what is kept in registers, and rows that do not fill a vector."""
    problem = block_of(77, [16, 32, 5, 13], 4)
    expected = rounding._round_block(*problem, sweeps)
    monkeypatch.setattr(cpu, "best_isa", lambda: isa)
    found = round_block(*problem, sweeps)
    same = (found.codes == expected.codes).all(0) & (found.selector == expected.selector).all(0)
    assert same.double().mean() > 0.9  # one code at a tie changes what follows in its row
    assert torch.equal(found.scale[:, same], expected.scale[:, same])
    assert torch.allclose(found.errors[:, same], expected.errors[:, same], rtol=1e-3, atol=1e-4)


def test_more_candidates_and_sweeps_help(path, monkeypatch):
    target, metric, sizes, books, candidates = block_of(200, [32, 32], 5)
    errors = []
    for sweeps, tried in ((0, candidates[2:3]), (0, candidates), (3, candidates)):
        monkeypatch.setattr(rounding, "SWEEPS", sweeps)
        rounded = round_block(target, metric, sizes, books, tried)
        errors.append(errors_of(rounded, target, metric, sizes, books))
    assert (errors[1] / errors[0]).mean() < 0.97
    assert (errors[2] / errors[1]).mean() < 0.95
    assert (errors[2] <= errors[1] * (1 + 1e-4)).all()  # descent alone never raises a row


def test_zero_rows_and_zero_scales(path):
    target, metric, sizes, books, candidates = block_of(20, [16, 16], 3)
    target[:, 3] = 0
    candidates[:, :, 3] = 0
    candidates[:, 0, 5] = 1e-40  # has no finite reciprocal
    rounded = round_block(target, metric, sizes, books, candidates)
    assert torch.isfinite(rounded.errors).all()
    assert not rounded.values[:, 3].any()


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_show(threads):
    target, metric, sizes, books, candidates = block_of(333, [16] * 16, 3)
    expected = round_block(target, metric, sizes, books, candidates)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = round_block(target, metric, sizes, books, candidates)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.errors, expected.errors)
    assert torch.equal(found.codes, expected.codes)


@needs_library
@pytest.mark.parametrize("rounding", ["gptq", "gptq-thorough"])
def test_both_paths_agree_on_a_layer(rounding, monkeypatch):
    x = torch.randn(900, 300) @ (torch.eye(300) + torch.randn(300, 300) / 300**0.5)
    statistics, weight = Statistics(x.square().mean(0), 900, x.T @ x / 900), torch.randn(70, 300)
    monkeypatch.setattr(annealing, "_kernel", lambda *of: None)  # it has no slow path
    for config in (AAACConfig("nvfp4", rounding=rounding), AAACConfig("int4", 64, rounding=rounding)):
        errors = []
        for chosen in (compiled.library, lambda: None):
            with monkeypatch.context() as patch:
                patch.setattr(compiled, "library", chosen)
                fresh = Statistics(statistics.second_moment, statistics.tokens, statistics.hessian)
                errors.append(float(encode(weight, config, fresh).error))
        assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_bad_blocks_are_refused_before_the_library_sees_them():
    target, metric, _, books, candidates = block_of(8, [16, 16], 2)
    good = dict(zip(("factor", "metric", "root"), (metric.factor, metric.matrix, metric.root), strict=True))
    good |= {"codebooks": books, "candidates": candidates, "ends": torch.tensor([0, 16, 32], dtype=torch.int32)}
    bad = {
        "factor": metric.factor[:31],
        "metric": metric.matrix.double(),
        "codebooks": books[:, :15],
        "candidates": candidates[:, :, :7],
        "ends": torch.tensor([0, 40, 32], dtype=torch.int32),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name if name != "ends" else "ends must"):
            compiled.round_block(target, **good | {name: value}, sweeps=1)
    with pytest.raises(ValueError, match="no block"):
        compiled.round_block(target.double(), **good, sweeps=1)
    wide = metric_of(BLOCK_COLUMNS + 1)
    parts = {"factor": wide.factor, "metric": wide.matrix, "root": wide.root, "codebooks": books}
    with pytest.raises(ValueError, match="no block"):
        compiled.round_block(
            torch.randn(BLOCK_COLUMNS + 1, 8),
            **parts,
            candidates=torch.ones(1, 1, 8),
            ends=torch.tensor([0, BLOCK_COLUMNS + 1], dtype=torch.int32),
            sweeps=1,
        )


def test_without_the_library_there_is_one_warning(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.delenv("AAAC_CPU_ISA", raising=False)
    with caplog.at_level(logging.WARNING):
        assert [compiled.library.__wrapped__() for _ in range(3)] == [None] * 3
    assert caplog.text.count("Install a C compiler") == 1
