"""The encoder's rounding kernel against plain fp64, in Triton's interpreter; what it rejects, and when it is used."""

from __future__ import annotations

import importlib.util
import pathlib
from functools import partial

import pytest
import torch
from interpreter import run_in_interpreter
from test_rounding import block_of, errors_of

from aaac_ao.encode import rounding
from aaac_ao.encode.rounding import BLOCK_COLUMNS, round_block
from aaac_ao.kernels import verify

HELPER = pathlib.Path(__file__).with_name("rounding_in_interpreter.py")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return run_in_interpreter(HELPER)


@pytest.mark.parametrize("kind", ["codes", "error", "returned errors", "choices", "again", "zeros", "check"])
def test_kernel_is_plain_rounding(results, kind):
    mine = [r for r in results if r["kind"] == kind]
    assert mine
    too_far = [r for r in mine if not r["ratio"] <= 1]
    assert not too_far, f"{len(too_far)} of {len(mine)} cases: {too_far[:5]}"


def test_damages_are_noticed(results):
    mine = [r for r in results if r["kind"] == "broken"]
    assert len(mine) == 7
    assert not [r for r in mine if not r["ratio"] > 1]


def test_all_paths_take_the_same_blocks():
    from aaac_ao.kernels import rounding as kernel

    assert kernel.MOST_COLUMNS == BLOCK_COLUMNS


def test_programs_are_one_warp_of_known_sizes():
    from aaac_ao.kernels.rounding import tiles

    assert tiles(64, 64) == {"ROWS": 4, "TRIALS": 8, "COLUMNS": 64, "GROUP": 64, "num_warps": 1}
    assert tiles(200, 128) == {"ROWS": 2, "TRIALS": 8, "COLUMNS": 256, "GROUP": 128, "num_warps": 1}
    assert tiles(1, 1)["COLUMNS"] == tiles(1, 1)["GROUP"] == 16


def test_bad_blocks_are_refused():
    from aaac_ao.kernels import rounding as kernel

    target, metric, sizes, books, candidates = block_of(8, [16, 16], 2)
    good = {"target": target, "factor": metric.factor, "metric": metric.matrix, "root": metric.root}
    good |= {"codebooks": books, "candidates": candidates, "sizes": sizes, "sweeps": 1}
    for name, value, message in (
        ("target", target.double(), "target must be torch.float32"),
        ("factor", metric.factor[:31], "factor must be"),
        ("metric", metric.matrix.double(), "metric must be"),
        ("root", metric.root.to("meta"), "root must be .* on meta"),
        ("codebooks", books[:, :15], "codebooks must be"),
        ("candidates", candidates[:, :, :7], "candidates must be"),
        ("candidates", candidates[:0], "no block"),
        ("sizes", [16, 15], "add up to 32"),
        ("sizes", [32, 0], "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.round_block(**good | {name: value})
    wide, columns = torch.zeros(1, BLOCK_COLUMNS + 1, 4), [BLOCK_COLUMNS + 1]
    square = torch.zeros(BLOCK_COLUMNS + 1, BLOCK_COLUMNS + 1)
    with pytest.raises(ValueError, match="no block"):
        kernel.round_block(wide[0], square, square, square, books, wide[:, :1], columns, 1)
    long = torch.empty(32, 2**26, device="meta")
    square = torch.empty(32, 32, device="meta")
    parts = (long, square, square, square, books.to("meta"), torch.empty(1, 2, 2**26, device="meta"))
    with pytest.raises(ValueError, match="split its rows"):
        kernel.round_block(*parts, sizes, 1)


def test_a_kernel_that_differs_or_fails_is_not_used(monkeypatch):
    """The check itself, with PyTorch in the place of the kernel; a CPU never asks for it."""
    from aaac_ao.kernels import rounding as kernel

    def pytorch(flipped, target, factor, metric, root, books, candidates, sizes, sweeps):
        rounded = rounding._round_block(target, rounding.Metric(metric, factor, root), sizes, books, candidates)
        return rounded.codes ^ flipped, rounded.selector, rounded.scale, rounded.errors

    monkeypatch.setattr(verify, "fast_is_right", lambda variant, _, results: verify._compare(variant, results))
    for flipped, right in ((0, True), (8, False), (None, False)):
        monkeypatch.setattr(kernel, "round_block", partial(pytorch, flipped))
        assert rounding._is_right(kernel, torch.device("cpu"), 60, 64) == right


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sizes", [[16] * 16, [64] * 4, [128, 40], [64]])
def test_the_gpu_rounds_as_well_as_pytorch(sizes, caplog):
    target, metric, sizes, books, candidates = (
        part.cuda() if isinstance(part, torch.Tensor) else part for part in block_of(333, sizes, 9)
    )
    metric = rounding.Metric(metric.matrix.cuda(), metric.factor.cuda(), metric.root.cuda())
    block = (target, metric, sizes, books, candidates)
    errors = [errors_of(path(*block), target, metric, sizes, books) for path in (round_block, rounding._round_block)]
    assert errors[0].sum().item() == pytest.approx(errors[1].sum().item(), rel=1e-3)
    assert not caplog.records
    assert torch.equal(round_block(*block).errors, round_block(*block).errors)
