"""The CPU kernel: a shared library in C, compiled when the package is installed, and its binding.

It runs on the stored tiles, so a weight exists once. Four paths (AVX-512, AVX2 with and without AVX-VNNI, plain C)
share one interface; the best one that the machine has is chosen when the library is first used. `AAAC_CPU_ISA` in the
environment asks for another: "avx_vnni", "avx2", "plain", or "none" to do without the library.

Sizes, dtypes and strides are checked here, before a pointer leaves Python. The calls release the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from .library import load

#: Arithmetic of `linear`: fp32; integers of 15 or 16 bits for inputs, 14 for books; of 7 or 8 and 8 bits.
MODES = ("exact", "int16", "int8")
#: Instruction sets in the order of the library, the best last.
ISAS = ("plain", "avx2", "avx_vnni", "avx512")
GROUP_SIZES = (16, 32)  # and all multiples of 64

#: Most tokens for which `linear` is faster than decoding to fp32 and a matrix product, by instruction set and mode.
ANY = 1 << 62
MOST_TOKENS = {
    "plain": {"exact": 4, "int16": 4, "int8": 4},
    "avx2 by halves": {"exact": 24, "int16": 96, "int8": 96},
    "avx2": {"exact": 24, "int16": ANY, "int8": ANY},
    "avx_vnni": {"exact": 24, "int16": ANY, "int8": ANY},
    "avx512": {"exact": 48, "int16": ANY, "int8": ANY},
}

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SCALE_TYPES = {torch.bfloat16: 0, torch.float8_e4m3fn: 1}
_WEIGHT = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
_WEIGHT += [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
_X = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library with its signatures, or None."""
    library = load("_linear")
    if library is None:
        return None
    library.aaac_linear.argtypes = [ctypes.c_int] * 3 + _X + _WEIGHT + [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    library.aaac_dequantize.argtypes = [ctypes.c_int] * 2 + _WEIGHT + [ctypes.c_void_p]
    return library


def isas() -> list[str]:
    """The instruction sets that this machine and the library have, the best last; empty without the library."""
    library = _library()
    return [] if library is None else [isa for i, isa in enumerate(ISAS) if library.aaac_has_isa(i)]


@functools.cache
def best_isa() -> str | None:
    """The instruction set in use: the machine's best, or that of `AAAC_CPU_ISA`; None without the library.

    Raises:
        ValueError: `AAAC_CPU_ISA` names none, or one that this machine lacks.
    """
    return _choose_isa()


def _choose_isa() -> str | None:
    wanted = os.environ.get("AAAC_CPU_ISA")
    if wanted not in (None, "", "none", *ISAS):
        raise ValueError(f"AAAC_CPU_ISA must be one of {', '.join(ISAS)} or none, got {wanted!r}")
    here = [] if wanted == "none" else isas()
    if not here:
        return None
    if wanted and wanted not in here:
        raise ValueError(f"AAAC_CPU_ISA is {wanted}, but this machine has only {', '.join(here)}")
    return wanted or here[-1]


def supports(scale: torch.Tensor, group_size: int) -> bool:
    """Whether the kernel is there and takes weights with these scales and groups."""
    known = group_size in GROUP_SIZES or (group_size > 0 and group_size % 64 == 0)
    return known and scale.dtype in _SCALE_TYPES and best_isa() is not None


def most_tokens(mode: str) -> int:
    """Up to how many tokens `linear` should be used in a mode; the library must be there."""
    isa = best_isa()
    return MOST_TOKENS["avx2 by halves" if isa == "avx2" and _halves_vectors() else isa][mode]


@functools.cache
def _halves_vectors() -> bool:
    return bool(_library().aaac_halves_vectors())


def linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    bias: torch.Tensor | None = None,
    mode: str = "int16",
    isa: str | None = None,
) -> torch.Tensor:
    """Return x @ w.T + bias for a stored weight w [N, K].

    Args:
        x: [..., K], fp32 or bf16.
        qdata: packed codes, uint8 [ceil(N / 16), ceil(K / 64) * 512]; rows may be strided.
        scale: signed scales [N, ceil(K / group_size)], bf16 or float8_e4m3fn; rows may be strided.
        codebooks: bf16 [2, 16].
        per_tensor_scale: fp32, one number, or None.
        group_size: weights per scale along K; 16, 32 or a multiple of 64.
        bias: [N], any float dtype, or None.
        mode: one of `MODES`. "int16" rounds blocks of 8 inputs to 16 bits (AVX2: of 16 inputs to 15 bits) and the books
            to 14; "int8" rounds the same blocks to 8 bits (AVX2 without AVX-VNNI: 7) and the books to 8. Tokens that
            are not finite or tiny are always computed in fp32.
        isa: one of `ISAS`; None: the best.

    Returns:
        y [..., N] in x's dtype, contiguous. The same bits for any number of threads.

    Raises:
        ValueError: a dtype, shape or stride the kernel does not take, an unknown mode, or no such instruction set.
    """
    if x.dim() == 0 or x.dtype not in _TYPES or not x.is_cpu:
        raise ValueError(f"x must be fp32 or bf16 [..., K] on the CPU, got {x.dim()}-D {x.dtype} on {x.device}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    _check_weight(qdata, scale, codebooks, per_tensor_scale, group_size, x.shape[-1])
    if bias is not None and (tuple(bias.shape) != (scale.shape[0],) or not bias.is_cpu):
        raise ValueError(f"bias must have shape [{scale.shape[0]}] on the CPU, got {list(bias.shape)} on {bias.device}")
    return run_linear(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, mode, isa)


def run_linear(x, qdata, scale, codebooks, per_tensor_scale, group_size, bias, mode, isa=None) -> torch.Tensor:
    """`linear` for those who have checked dtypes, shapes and devices: all but strides."""
    in_features, out_features = x.shape[-1], scale.shape[0]
    # kept in variables: what `contiguous` makes must outlive the call
    weight = _laid_out(qdata, scale, codebooks, per_tensor_scale)
    if bias is not None:
        bias = (bias if bias.dtype in _TYPES else bias.float()).contiguous()
    flat = x.dim() == 2
    rows_in_place = (flat and x.stride(1) == 1) or x.is_contiguous()
    x = x if rows_in_place and _aligned(x) else x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    status = _library().aaac_linear(
        _isa_index(isa),
        MODES.index(mode),
        torch.get_num_threads(),
        x.data_ptr(),
        _TYPES[x.dtype],
        x.stride(0) if flat else in_features,
        y.numel() // out_features,
        *_pointers(weight, group_size, in_features),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else _TYPES[bias.dtype],
        y.data_ptr(),
    )
    _check_status(status)
    return y


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    codebooks: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    group_size: int,
    in_features: int,
    isa: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The stored weight as fp32 [N, in_features], in `out` if that is given; the rest is as for `linear`."""
    _check_weight(qdata, scale, codebooks, per_tensor_scale, group_size, in_features)
    weight = _laid_out(qdata, scale, codebooks, per_tensor_scale)
    shape = (scale.shape[0], in_features)
    out = torch.empty(shape) if out is None else out
    if tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_cpu or not out.is_contiguous():
        raise ValueError(
            f"out must be fp32 {list(shape)}, contiguous, on the CPU, got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if out.numel() == 0:
        return out
    arguments = _pointers(weight, group_size, in_features)
    _check_status(_library().aaac_dequantize(_isa_index(isa), torch.get_num_threads(), *arguments, out.data_ptr()))
    return out


def _check_weight(qdata, scale, codebooks, per_tensor_scale, group_size, in_features) -> None:
    """Rejects whatever would make the library read outside of the parts."""
    if not supports(scale, group_size):
        raise ValueError(f"no CPU kernel for {scale.dtype} scales with group_size {group_size} (library: {best_isa()})")
    rows, row_bytes = -(-scale.shape[0] // 16), -(-in_features // 64) * 512
    if qdata.dtype != torch.uint8 or tuple(qdata.shape) != (rows, row_bytes):
        raise ValueError(f"qdata must be uint8 [{rows}, {row_bytes}], got {qdata.dtype} {list(qdata.shape)}")
    if scale.dim() != 2 or scale.shape[1] != -(-in_features // group_size):
        raise ValueError(f"scale must be [N, {-(-in_features // group_size)}], got {list(scale.shape)}")
    if codebooks.dtype != torch.bfloat16 or tuple(codebooks.shape) != (2, 16):
        raise ValueError(f"codebooks must be bf16 [2, 16], got {codebooks.dtype} {list(codebooks.shape)}")
    if per_tensor_scale is not None and (per_tensor_scale.dtype != torch.float32 or per_tensor_scale.numel() != 1):
        raise ValueError(
            f"per_tensor_scale must be one fp32 number, got {per_tensor_scale.dtype} {list(per_tensor_scale.shape)}"
        )
    on_cpu = qdata.is_cpu and scale.is_cpu and codebooks.is_cpu
    if not on_cpu or (per_tensor_scale is not None and not per_tensor_scale.is_cpu):
        parts = (qdata, scale, codebooks, per_tensor_scale)
        raise ValueError(f"all parts must be on the CPU, got {[str(p.device) for p in parts if p is not None]}")


def _laid_out(qdata, scale, codebooks, per_tensor_scale) -> tuple:
    """The parts, with strides that the library takes."""
    qdata = qdata if qdata.stride(1) == 1 else qdata.contiguous()
    if scale.stride(1) != 1 or not _aligned(scale):
        scale = scale.clone(memory_format=torch.contiguous_format)
    return qdata, scale, codebooks.contiguous(), per_tensor_scale


def _pointers(weight: tuple, group_size: int, in_features: int) -> tuple:
    qdata, scale, codebooks, per_tensor_scale = weight
    return (
        qdata.data_ptr(),
        qdata.stride(0),
        scale.data_ptr(),
        scale.stride(0) * scale.element_size(),
        _SCALE_TYPES[scale.dtype],
        codebooks.data_ptr(),
        None if per_tensor_scale is None else per_tensor_scale.data_ptr(),
        group_size,
        scale.shape[0],
        in_features,
    )


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % tensor.element_size() == 0


def _isa_index(isa: str | None) -> int:
    isa = best_isa() if isa is None else isa
    if isa not in ISAS:
        raise ValueError(f"isa must be one of {', '.join(ISAS)}, got {isa!r}")
    return ISAS.index(isa)


def _check_status(status: int) -> None:
    if status == -1:
        raise MemoryError("the CPU kernel got no memory for its packed inputs")
    if status != 0:
        raise ValueError("this machine does not have the instruction set that was asked for")
