"""Codes that no change of a single weight, or of a block, would improve: over hills to better ones.

Simulated annealing: every code in turn is set to its best value with all others fixed, but with noise on what is best,
which fades from sweep to sweep. At the end a row keeps its new codes if they are better.

As in `feedback`, everything is laid out [K, N], transposed against the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from aaac_ao.encode.feedback import Grid
from aaac_ao.encode.scales import reciprocal

#: Codes that are set in a row's sweeps, and the least sweeps: a step costs K additions, so wide rows get fewer.
STEPS, LEAST_SWEEPS = 1 << 16, 32
#: Mean square of the noise at the start, in what a weight adds to the error of its row; it falls to nothing linearly.
TEMPERATURE = 0.1
#: Sweeps without noise, at the end.
COLD_SWEEPS = 2


def sweeps_of(columns: int) -> int:
    """How often the codes of a row of so many columns are gone through."""
    return max(LEAST_SWEEPS, STEPS // columns)


def anneal(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor, sweeps: int | None = None
) -> torch.Tensor:
    """Better codes for given scales and books, as far as there is a kernel for it; else the same.

    Args:
        weight: [K, N] fp32.
        hessian: [K, K], positive definite.
        grid: scales, selectors and books.
        codes: [K, N] uint8.
        sweeps: over all columns; `sweeps_of` them by default.

    Returns:
        Codes [K, N] uint8; the error (w_n - q_n)^T H (w_n - q_n) of no row is larger. The same for the same input,
        whatever the number of threads.
    """
    run = _kernel(weight.device)
    if run is None:
        return codes
    values, new = grid.values(codes), codes.clone(memory_format=torch.contiguous_format)
    lost = values - weight
    pull = hessian @ lost
    error = (pull * lost).sum(0).clamp(min=0)
    heat = (3 * TEMPERATURE / len(weight) * error).sqrt()  # noise that is even in -a .. a has the mean square a^2 / 3
    shares = cooling(sweeps_of(len(weight)) if sweeps is None else sweeps).to(weight.device)
    step = hessian.diagonal().rsqrt()
    grew = run(
        values, new, pull, hessian, step, heat, shares, grid.codebooks, grid.scale, grid.selector, grid.group_size
    )
    return torch.where(grew < 0, new, codes)


def _kernel(device: torch.device) -> Callable[..., torch.Tensor] | None:
    """What does the work of `sweep_columns` there, or None."""
    from aaac_ao.kernels.cpu import rounding as compiled

    return compiled.anneal if device.type == "cpu" and compiled.library() is not None else None


def cooling(sweeps: int) -> torch.Tensor:
    """[sweeps] fp32 >= 0, what the noise of every sweep is multiplied by."""
    noisy = max(1, sweeps - COLD_SWEEPS)
    return (1 - torch.arange(sweeps) / noisy).clamp(min=0).sqrt()


def sweep_columns(
    values: torch.Tensor,
    codes: torch.Tensor,
    pull: torch.Tensor,
    metric: torch.Tensor,
    step: torch.Tensor,
    heat: torch.Tensor,
    cooling: torch.Tensor,
    codebooks: torch.Tensor,
    scale: torch.Tensor,
    selector: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """The sweeps as the kernels do them, in PyTorch: slow, and there to check the kernels.

    Args:
        values: [K, N] fp32, of the codes; overwritten.
        codes: [K, N] uint8; overwritten.
        pull: [K, N] fp32, H @ (values - weight); overwritten.
        metric: [K, K] fp32, H.
        step: [K] fp32, 1 / sqrt of H's diagonal.
        heat: [N] fp32, how far noise reaches at the start where H's diagonal is 1.
        cooling: [sweeps] fp32, what that is multiplied by.
        codebooks: [2, 16] fp32, ascending.
        scale: [groups, N] fp32 >= 0.
        selector: [groups, N] uint8, 0 or 1.
        group_size: columns per group.

    Returns:
        [N] fp32, by how much the error of a row grew.
    """
    (columns, rows), middles = codes.shape, (codebooks[:, 1:] + codebooks[:, :-1]) / 2
    grew = torch.zeros_like(heat)
    for sweep, share in enumerate(cooling.tolist()):
        for i in range(columns):
            own, second = scale[i // group_size], selector[i // group_size].long()
            wanted = values[i] - pull[i] / metric[i, i] + heat * share * noise(rows, sweep * columns + i) * step[i]
            codes[i] = (wanted * reciprocal(own) > middles[second].t()).sum(0)
            moved = codebooks[second, codes[i].long()] * own
            change = moved - values[i]
            grew += change * (2 * pull[i] + change * metric[i, i])
            pull.addr_(metric[i], change)
            values[i] = moved
    return grew


def noise(rows: int, counter: int) -> torch.Tensor:
    """[rows] fp32, evenly between -1 and 1: a hash of row and counter (the finishing steps of lowbias32)."""
    whole = 0xFFFFFFFF
    x = (torch.arange(rows) * 0x9E3779B1 + counter) & whole
    x = ((x ^ x >> 16) * 0x7FEB352D) & whole
    x = ((x ^ x >> 15) * 0x846CA68B) & whole
    return (x ^ x >> 16).to(torch.uint32).view(torch.int32).float() * 2.0**-31
