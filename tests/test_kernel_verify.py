"""A fast kernel is used only after it agreed with the portable twin; the device is a fake."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from aaac_ao.kernels import verify

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No verdicts of other tests, and no capture."""
    verify.forget()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield
    verify.forget()


class Results:
    """What a check runs; counts how often."""

    def __init__(self, error: float = 0.0, raises: Exception | None = None):
        self.calls, self.raises = 0, raises
        self.twin = torch.randn(3, 21)
        self.fast = self.twin.clone()
        self.fast[1, 7] += error * self.twin[:, 7].abs().max()

    def __call__(self):
        self.calls += 1
        if self.raises is not None:
            raise self.raises
        return self.fast, self.twin


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_agreement_is_checked_once_per_variant_and_device(caplog):
    results = Results()
    assert all(verify.fast_is_right("a", GPU, results) for _ in range(3))
    assert results.calls == 1
    assert verify.fast_is_right("b", GPU, results)
    assert verify.fast_is_right("a", torch.device("cuda", 1), results)
    assert results.calls == 3
    assert not warnings(caplog)


@pytest.mark.parametrize("error", [0.05, -1.0, float("nan"), float("inf")])
def test_a_difference_in_one_column_falls_back_with_one_warning(caplog, error):
    results = Results(error)
    assert not any(verify.fast_is_right("a", GPU, results) for _ in range(3))
    assert results.calls == 1
    assert len(warnings(caplog)) == 1
    assert "differs from the portable kernel" in warnings(caplog)[0]


def test_rounding_is_no_difference(caplog):
    assert verify.fast_is_right("a", GPU, Results(0.005))


def test_a_failure_to_compile_falls_back_with_one_warning(caplog):
    results = Results(raises=RuntimeError("ptxas fatal: Unsupported"))
    assert not any(verify.fast_is_right("a", GPU, results) for _ in range(3))
    assert results.calls == 1
    assert len(warnings(caplog)) == 1
    assert "ptxas fatal" in warnings(caplog)[0]


def test_nothing_is_checked_while_a_graph_is_captured(caplog, monkeypatch):
    results = Results()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not any(verify.fast_is_right("a", GPU, results) for _ in range(3))
    assert results.calls == 0
    assert len(warnings(caplog)) == 1
    assert "warmup" in warnings(caplog)[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert verify.fast_is_right("a", GPU, results)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert verify.fast_is_right("a", GPU, results)


def test_a_cpu_has_no_fast_kernel():
    results = Results()
    assert not verify.fast_is_right("a", torch.device("cpu"), results)
    assert results.calls == 0


@pytest.mark.parametrize(("scale_dtype", "group_size"), [(torch.float8_e4m3fn, 16), (torch.bfloat16, 64)])
def test_the_problem_shows_every_damage(scale_dtype, group_size):
    """Wrong codes, books, scales of any size or a lost column move some row by more than the tolerance."""
    from aaac_ao.formats import load_scale
    from aaac_ao.packing import unpack

    x, qdata, scale, codebooks = verify.problem(
        torch.device("cpu"), torch.bfloat16, scale_dtype, group_size, (7, 37, 848)
    )
    magnitude, selector = (t.repeat_interleave(group_size, 1)[:, :848] for t in load_scale(scale))
    codes = unpack(qdata, 37, 848).long()
    assert magnitude.isfinite().all()
    assert len(set(magnitude.amax(1).tolist())) > 8  # scales of many sizes
    assert set(codes.flatten().tolist()) == set(range(16))
    assert selector.float().mean().sub(0.5).abs() < 0.1

    def y(codes, selector, magnitude, x):
        return x.double() @ (codebooks.double()[selector.long(), codes] * magnitude).T

    right = y(codes, selector, magnitude, x)
    small = magnitude < magnitude.amax() / 128  # as a decoder without subnormals would read them
    damages = {
        "book": y(codes, 1 - selector.long(), magnitude, x),
        "code": y(codes ^ 1, selector, magnitude, x),
        "scale": y(codes, selector, torch.where(small, 0.0, magnitude), x),
        "lane": y(codes.roll(8, 1), selector, magnitude, x),
        "tail": y(codes, selector, magnitude, torch.cat([x[:, :768], torch.zeros(7, 80)], 1)),
    }
    for name, wrong in damages.items():
        assert not verify.fast_is_right(name, GPU, lambda wrong=wrong: (wrong, right)), name
