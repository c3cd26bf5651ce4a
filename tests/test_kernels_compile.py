"""Every kernel compiles for sm_80, sm_90 and sm_100; ptxas needs no GPU. The small-M kernel must not spill."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
    ),
]

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CAPABILITIES = (80, 90, 100)
GROUP_SIZES = (16, 32, 64, 128)
#: Shared memory of a block on sm_80; consumer chips of that generation (sm_86, sm_89, sm_120) have less.
SHARED_LIMIT = 163 * 1024
SMALL_SHARED_LIMIT = 99 * 1024


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Compile anew: a cache of earlier runs would hide a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_kernel(kernel, capability: int, dtype: torch.dtype, group_size: int, constants: dict, **options):
    """Compile with the argument types of a launch: 16-divisible pointers and sizes, M of any value."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {"G": group_size, **constants} if "G" in kernel.arg_names else dict(constants)
    types = {
        **dict.fromkeys(("x_ptr", "y_ptr", "w_ptr", "bias_ptr"), POINTERS[dtype]),
        "qdata_ptr": "*u8",
        "scale_ptr": "*u8" if group_size == 16 else "*i16",
        "codebook_ptr": "*bf16",
        "partial_ptr": "*fp32",
        "per_tensor_scale_ptr": "*fp32",
    }
    types.update(dict.fromkeys(("M", "N", "K", "stride_x", "stride_qdata", "stride_scale"), "i32"))
    if group_size != 16:
        constants["per_tensor_scale_ptr"] = None
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    positions = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={positions[name]: value for name, value in constants.items()},
        attrs={positions[n]: [["tt.divisibility", 16]] for n in signature if signature[n] != "constexpr" and n != "M"},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_linear(tokens: int, capability: int, dtype: torch.dtype, group_size: int, **constants):
    """Compile what `dispatch.linear` would launch for this many tokens."""
    from aaac_ao.kernels import dispatch

    launch = dispatch.choose(tokens)
    constants = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, **constants}
    if launch.kernel is dispatch.decode_kernel:
        constants = {"SPLITS": 4, **constants}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return compile_kernel(launch.kernel, capability, dtype, group_size, constants, **options)


def stack_bytes(compiled, directory) -> int:
    """Bytes of stack per thread in the machine code: where spilled registers go."""
    from triton import knobs

    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout + usage.stderr).groups()
    return int(stack) + int(local)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tokens", [1, 16])
def test_decode(tokens, capability, group_size, tmp_path):
    for dtype in POINTERS if capability == 90 else (torch.bfloat16,):
        compiled = compile_linear(tokens, capability, dtype, group_size)
        assert stack_bytes(compiled, tmp_path) == 0, f"registers spill with {dtype}"
        assert compiled.metadata.shared <= SMALL_SHARED_LIMIT
        assert "mma.sync" in compiled.asm["ptx"]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tokens", [32, 1000])
def test_gemm(tokens, capability, group_size):
    for dtype in POINTERS if capability == 90 else (torch.bfloat16,):
        compiled = compile_linear(tokens, capability, dtype, group_size)
        assert compiled.metadata.shared <= SHARED_LIMIT


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dequantize(capability, group_size):
    from aaac_ao.kernels import dispatch

    constants = {"BLOCK_N": dispatch.DEQUANTIZE_BLOCK, "BLOCK_K": dispatch.DEQUANTIZE_BLOCK}
    for dtype in POINTERS:
        compiled = compile_kernel(dispatch.dequantize_kernel, capability, dtype, group_size, constants)
        assert compiled.metadata.shared <= SMALL_SHARED_LIMIT


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_finish(capability):
    from aaac_ao.kernels import dispatch

    constants = {"BLOCK_N": dispatch.FINISH_BLOCK, "SPLITS": dispatch.MAX_SPLITS}
    for dtype, group_size in zip(POINTERS, (16, 64, 128), strict=True):
        assert compile_kernel(dispatch.finish_kernel, capability, dtype, group_size, constants).asm["cubin"]


def test_without_bias_and_without_splits():
    compiled = compile_linear(1, 90, torch.bfloat16, 128, bias_ptr=None, SPLITS=1, partial_ptr=None)
    assert compiled.asm["cubin"]


def test_the_spill_check_sees_spills(tmp_path):
    """A block far too large for its warps has to spill, or `stack_bytes` reads the wrong numbers."""
    compiled = compile_linear(1, 90, torch.float32, 64, BLOCK_M=64, BLOCK_N=128)
    assert stack_bytes(compiled, tmp_path) > 0
