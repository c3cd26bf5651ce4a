"""Rounding of blocks of columns and annealing on the CPU, for the encoder: the binding of `rounding.c`.

The library is compiled when the package is installed. Without it the encoder works with PyTorch alone, and slowly.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from .. import cpu
from ..rounded_blocks import MOST_COLUMNS, check_annealing, check_parts
from .library import load


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None; `AAAC_CPU_ISA=none` in the environment asks to do without."""
    if os.environ.get("AAAC_CPU_ISA") == "none":
        return None
    found = load("_rounding")
    if found is None:
        return None
    found.aaac_round_block.argtypes = [ctypes.c_void_p] * 11 + [ctypes.c_int64] + [ctypes.c_int] * 6
    found.aaac_round_block.restype = None
    found.aaac_anneal.argtypes = [ctypes.c_void_p] * 11 + [ctypes.c_int64] + [ctypes.c_int] * 5
    found.aaac_anneal.restype = ctypes.c_int
    found.aaac_has_bfloat16.argtypes, found.aaac_has_bfloat16.restype = [], ctypes.c_int
    return found


@functools.cache
def has_bfloat16() -> bool:
    """Whether matrix products of bf16 numbers are faster than those of fp32 here, by a factor of three to ten."""
    return library() is not None and cpu.best_isa() == "avx512" and bool(library().aaac_has_bfloat16())


def _isa() -> int:
    return cpu.ISAS.index(cpu.best_isa() or "plain")


def round_block(
    target: torch.Tensor,
    factor: torch.Tensor,
    metric: torch.Tensor,
    root: torch.Tensor,
    codebooks: torch.Tensor,
    candidates: torch.Tensor,
    ends: torch.Tensor,
    sweeps: int,
) -> tuple[torch.Tensor, ...]:
    """Codes, selectors, scales, errors and values of a block; see `aaac_ao.encode.rounding.round_block`.

    Args:
        target: [B, N] fp32 on the CPU, B <= `MOST_COLUMNS`.
        factor: [B, B] fp32, upper.
        metric: [B, B] fp32.
        root: [B, B] fp32, lower.
        codebooks: [2, 16] fp32, ascending.
        candidates: [count, groups, N] fp32.
        ends: [groups + 1] int32, from 0 to B and rising.
        sweeps: passes of coordinate descent.

    Returns:
        Codes uint8 [B, N], selectors uint8 [groups, N], scales fp32 [groups, N], root @ error fp32 [B, N], and values
        fp32 [B, N].

    Raises:
        ValueError: sizes, dtypes or devices that do not fit.
    """
    columns, rows = target.shape
    count, groups = candidates.shape[:2]
    parts = {"factor": factor, "metric": metric, "root": root, "codebooks": codebooks, "candidates": candidates}
    check_parts(columns, rows, groups, torch.device("cpu"), **parts)
    if not 1 <= columns <= MOST_COLUMNS or target.dtype != torch.float32 or count == 0:
        raise ValueError(f"no block: target {target.dtype} {list(target.shape)}, {count} candidates")
    steps = ends.diff()
    if ends.dtype != torch.int32 or len(ends) != groups + 1 or ends[0] != 0 or ends[-1] != columns or steps.min() < 1:
        raise ValueError(f"ends must be int32 and rise from 0 to {columns} in {groups} steps, got {ends.tolist()}")
    errors, values = target.clone(memory_format=torch.contiguous_format), torch.empty(columns, rows)
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    selector = torch.empty(groups, rows, dtype=torch.uint8)
    scale = torch.empty(groups, rows, dtype=torch.float32)
    inputs = [tensor.contiguous() for tensor in (factor, metric, root, codebooks, candidates, ends)]
    pointers = [tensor.data_ptr() for tensor in (errors, *inputs, values, scale, selector, codes)]
    library().aaac_round_block(*pointers, rows, columns, groups, count, sweeps, _isa(), torch.get_num_threads())
    return codes, selector, scale, errors, values


def anneal(
    values: torch.Tensor,
    codes: torch.Tensor,
    pull: torch.Tensor,
    metric: torch.Tensor,
    noise: torch.Tensor,
    heat: torch.Tensor,
    codebooks: torch.Tensor,
    scale: torch.Tensor,
    selector: torch.Tensor,
    offset: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """By how much the errors of rows grew, [N] fp32; see `aaac_ao.encode.annealing.sweep_columns`.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, or outputs that are not contiguous.
        MemoryError: there is none for the rows that are at work.
    """
    columns, rows, outputs = len(metric), len(heat), {"values": values, "codes": codes, "pull": pull}
    inputs = {"metric": metric, "noise": noise, "heat": heat, "codebooks": codebooks, "scale": scale}
    inputs |= {"selector": selector, "offset": offset}
    check_annealing(torch.device("cpu"), group_size, **outputs, **inputs)
    if rows and not 0 <= int(offset.min()) <= int(offset.max()) < columns:
        raise ValueError(f"offset must be from 0 to {columns - 1}, got {int(offset.min())} to {int(offset.max())}")
    growth = torch.zeros(rows)
    parts = [part.contiguous() for part in inputs.values()]
    pointers = [part.data_ptr() for part in (*outputs.values(), growth, *parts)]
    sizes = (rows, columns, group_size, len(noise), _isa(), torch.get_num_threads())
    if library().aaac_anneal(*pointers, *sizes):
        raise MemoryError(f"no memory for annealing rows of {columns} columns")
    return growth
