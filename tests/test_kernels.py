"""The kernels against an fp64 oracle, in Triton's interpreter; what `dispatch` rejects and chooses."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import pathlib
import subprocess
import sys
from functools import partial

import pytest
import torch
from interpreter import run_in_interpreter

HELPER = pathlib.Path(__file__).with_name("kernels_in_interpreter.py")
KINDS = [f"{kernel} G={group_size}" for kernel in ("linear", "dequantize") for group_size in (16, 32, 64, 128)]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """Both parts of the helper, side by side."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [
            result
            for part in pool.map(partial(run_in_interpreter, HELPER), ("portable", "assembly"))
            for result in part
        ]


@pytest.mark.parametrize(
    "kind",
    [
        *KINDS,
        "split K",
        "special",
        "rounding",
        "far",
        "assembly",
        "assembly is the twin",
        "pair table",
        "other order",
        "act_pre_scale",
    ],
)
def test_error_is_within_rounding(results, kind):
    mine = [r for r in results if r["kind"] == kind]
    assert mine
    too_far = [r for r in mine if not r["ratio"] <= 1]
    assert not too_far, f"{len(too_far)} of {len(mine)} cases: {too_far[:5]}"


@pytest.mark.parametrize(
    "kind",
    ["broken linear", "broken dequantize", "broken assembly", "broken pair table", "broken act_pre_scale"],
)
def test_a_damaged_weight_is_noticed(results, kind):
    mine = [r for r in results if r["kind"] == kind]
    assert mine
    unnoticed = [r for r in mine if not r["ratio"] > 1]
    assert not unnoticed, f"{len(unnoticed)} of {len(mine)} damages stay inside the bound: {unnoticed[:5]}"


def test_bound_is_tight_enough(results):
    """Were the worst ratios far below 1, the bounds would prove little."""
    assert max(r["ratio"] for r in results if r["kind"].startswith("dequantize")) > 0.4
    assert max(r["ratio"] for r in results if r["kind"].startswith("linear")) > 0.4


def _arguments(n: int = 32, k: int = 128, group_size: int = 64, **changes) -> dict:
    arguments = {
        "x": torch.zeros(2, k),
        "qdata": torch.zeros(-(-n // 16), -(-k // 64) * 512, dtype=torch.uint8),
        "scale": torch.zeros(n, -(-k // group_size), dtype=torch.bfloat16),
        "codebooks": torch.zeros(2, 16, dtype=torch.bfloat16),
        "per_tensor_scale": None,
        "group_size": group_size,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 128)}, "x must be 2-D .* 3-D"),
        ({"x": torch.zeros(2, 128, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(2, 129)}, r"qdata must be uint8 \[2, 1536\]"),
        ({"group_size": 48}, "group_size 48"),
        ({"scale": torch.zeros(32, 2)}, "float32 scales"),
        ({"scale": torch.zeros(32, 3, dtype=torch.bfloat16)}, r"\[N, 2\], got \[32, 3\]"),
        ({"scale": torch.zeros(2, 32, dtype=torch.bfloat16).T}, "scale must have stride 1"),
        ({"qdata": torch.zeros(2, 1024, dtype=torch.int8)}, "int8"),
        ({"codebooks": torch.zeros(16, dtype=torch.bfloat16)}, r"codebooks .* \[16\]"),
        ({"per_tensor_scale": torch.zeros((), dtype=torch.bfloat16)}, "per_tensor_scale"),
        ({"bias": torch.zeros(31)}, r"bias .* \[31\]"),
        ({"act_pre_scale": torch.ones(127)}, r"act_pre_scale must have shape \[128\], got \[127\]"),
        ({"act_pre_scale": torch.ones(128, device="meta")}, "act_pre_scale is on meta, the weight on cpu"),
        ({"bias": torch.zeros(32, device="meta")}, "bias is on meta, the weight on cpu"),
        ({"x": torch.zeros(2, 128, device="meta")}, "x is on meta, the weight on cpu"),
        ({"codebooks": torch.zeros(2, 16, dtype=torch.bfloat16, device="meta")}, "on meta and cpu"),
        ({"qdata": torch.zeros(2 * 1024 + 8, dtype=torch.uint8)[8:].view(2, 1024)}, "multiples of 16 bytes"),
    ],
)
def test_linear_rejects(changes, message):
    from aaac_ao.kernels import dispatch

    with pytest.raises(ValueError, match=message):
        dispatch.linear(**_arguments(**changes))


def test_a_grid_too_large_is_rejected():
    from aaac_ao.kernels import dispatch

    arguments = _arguments(x=torch.empty(2**38, 128, device="meta"))
    arguments |= {name: arguments[name].to("meta") for name in ("qdata", "scale", "codebooks")}
    with pytest.raises(ValueError, match="split the input"):
        dispatch.linear(**arguments)


def test_empty_inputs_launch_nothing():
    from aaac_ao.kernels import dispatch

    y = dispatch.linear(**_arguments(x=torch.zeros(0, 128, dtype=torch.float16)))
    assert y.shape == (0, 32)
    assert y.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_error_is_within_rounding_on_the_gpu(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "numerics", "--json", str(out)]
    run = subprocess.run(command, cwd=HELPER.parent.parent, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert json.loads(out.read_text())["right"]
