"""The portable kernels compile for every target; ptxas needs no GPU. `test_kernel_gates.py` has the fast ones."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("triton is not installed or only interprets", allow_module_level=True)

from benchmarks import sass

CAPABILITIES = (80, 90, 120)
#: Shared memory of a block on sm_80; consumer chips of that generation (sm_86, sm_89, sm_120) have less.
SHARED_LIMIT = 163 * 1024
SMALL_SHARED_LIMIT = 99 * 1024


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Compile anew: a cache of earlier runs would hide a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_exact(tokens: int, capability: int, group_size: int, **constants):
    """Compile what `dispatch.linear` would launch for this many fp32 tokens."""
    from aaac_ao.kernels import launch

    _, block_m, block_n, num_warps = next(row for row in launch.EXACT if tokens <= row[0])
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, **constants}
    return sass.compile_kernel(
        launch.exact_kernel, capability, "fp32", group_size, constants, num_warps=num_warps, num_stages=3
    )


@pytest.mark.parametrize("group_size", sass.GROUP_SIZES)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_exact(tokens, capability, group_size):
    compiled = compile_exact(tokens, capability, group_size)
    assert compiled.metadata.shared <= (SMALL_SHARED_LIMIT if tokens <= 16 else SHARED_LIMIT)
    if tokens <= 16:
        assert sass.resources(compiled.asm["cubin"])[1] == 0, "registers spill"
        assert "mma.sync" in compiled.asm["ptx"]


@pytest.mark.parametrize("group_size", sass.GROUP_SIZES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dequantize(capability, group_size):
    from aaac_ao.kernels import launch

    constants = {"BLOCK_N": launch.DEQUANTIZE_BLOCK, "BLOCK_K": launch.DEQUANTIZE_BLOCK}
    for dtype in sass.POINTERS:
        compiled = sass.compile_kernel(launch.dequantize_kernel, capability, dtype, group_size, constants)
        assert compiled.metadata.shared <= SMALL_SHARED_LIMIT


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_finish(capability):
    from aaac_ao.kernels import launch, table

    constants = {"BLOCK_N": launch.FINISH_BLOCK, "SPLITS": table.MAX_SPLITS}
    for dtype, group_size in zip(sass.POINTERS, (16, 64, 128), strict=True):
        assert sass.compile_kernel(launch.finish_kernel, capability, dtype, group_size, constants).asm["cubin"]


@pytest.mark.parametrize("capability", [*CAPABILITIES, 100])
@pytest.mark.parametrize(
    ("columns", "group_size"),
    [(16, 16), (64, 16), (64, 64), (128, 128), (256, 16), (256, 32), (256, 64), (256, 128)],
)
def test_rounding(capability, columns, group_size):
    """What feedback and descent launch: fp32 throughout, registers spill outside of loops over columns at most."""
    compiled = sass.compile_rounding(capability, columns, group_size)
    assert compiled.metadata.shared <= 1024
    assert "mma" not in compiled.asm["ptx"]
    assert sass.resources(compiled.asm["cubin"])[1] <= 64
    loops = sass.loops(sass.tool("nvdisasm", compiled.asm["cubin"]))
    columns_loops = [loop for loop in loops if any(instruction.startswith("FFMA") for instruction in loop)]
    assert len(columns_loops) >= 5  # what groups leave, trials, feedback, descent, errors
    assert not [line for loop in columns_loops for line in loop if line.startswith(("LDL", "STL"))]


@pytest.mark.parametrize("capability", [*CAPABILITIES, 100])
@pytest.mark.parametrize("columns", [16, 64, 4096])
def test_annealing(capability, columns):
    """As rounding: registers spill outside of the loop over columns at most."""
    compiled = sass.compile_annealing(capability, columns, 16)
    assert compiled.metadata.shared <= 1024
    assert "mma" not in compiled.asm["ptx"]
    assert sass.resources(compiled.asm["cubin"])[1] <= 64
    loops = sass.loops(sass.tool("nvdisasm", compiled.asm["cubin"]))
    columns_loops = [loop for loop in loops if any(instruction.startswith("FFMA") for instruction in loop)]
    assert columns_loops
    inner = min(columns_loops, key=len)
    assert not [line for line in inner if line.startswith(("LDL", "STL"))]


def test_without_factors_bias_and_splits():
    assert compile_exact(1, 90, 128, act_ptr=None, bias_ptr=None, partial_ptr=None).asm["cubin"]


def test_the_spill_check_sees_spills():
    """A block far too large for its warps has to spill, or `resources` reads the wrong numbers."""
    compiled = compile_exact(1, 90, 64, BLOCK_M=64, BLOCK_N=128)
    assert sass.resources(compiled.asm["cubin"])[1] > 0
