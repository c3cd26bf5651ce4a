"""Codes that no change of a single weight, or of a block, would improve: over hills to better ones.

Simulated annealing: every code in turn is set to its best value with all others fixed, but with noise on what is best,
which fades from sweep to sweep. At the end a row keeps its new codes if they are better.

As in `feedback`, everything is laid out [K, N], transposed against the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from aaac_ao.encode.grid import Grid
from aaac_ao.encode.rounding import triton_kernel
from aaac_ao.encode.scales import reciprocal

#: Additions in the sweeps of a row: K for every code that is set. Within these bounds it decides how many there are.
WORK, LEAST_SWEEPS, MOST_SWEEPS = 1 << 26, 32, 1024
#: Mean square of the noise at the start, in what a weight adds to the error of its row; it falls to nothing linearly.
TEMPERATURE = 0.1
#: Sweeps without noise, at the end.
COLD_SWEEPS = 2
_SEED = 0

#: `sweep_columns`, or a kernel that does the same.
Sweep = Callable[..., torch.Tensor]


def sweeps_of(columns: int) -> int:
    """How often the codes of a row of so many columns are gone through."""
    return min(MOST_SWEEPS, max(LEAST_SWEEPS, WORK // columns**2))


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
    run = _kernel(weight.device, len(weight), grid.group_size)
    if run is None:
        return codes
    values, new = grid.values(codes), codes.clone(memory_format=torch.contiguous_format)
    lost = values - weight
    pull = hessian @ lost
    error = (pull * lost).sum(0).clamp(min=0)
    heat = (3 * TEMPERATURE / len(weight) * error).sqrt()  # noise that is even in -a .. a has the mean square a^2 / 3
    pushes = noise(sweeps_of(len(weight)) if sweeps is None else sweeps, len(weight), weight.device)
    fixed = (grid.codebooks, grid.scale, grid.selector, offsets(weight), grid.group_size)
    grew = run(values, new, pull, hessian, pushes, heat, *fixed)
    return torch.where(grew < 0, new, codes)


def _kernel(device: torch.device, columns: int, group_size: int) -> Sweep | None:
    """What does the work of `sweep_columns` for weights of so many columns there, or None."""
    from aaac_ao.kernels.cpu import rounding as compiled

    if device.type == "cpu":
        return None if compiled.library() is None else compiled.anneal
    kernel = triton_kernel("annealing") if device.type == "cuda" else None
    return kernel.anneal if kernel is not None and _is_right(kernel, device, columns, group_size) else None


def _is_right(kernel: ModuleType, device: torch.device, columns: int, group_size: int) -> bool:
    """Whether the kernel, as compiled for such weights, does what PyTorch does; checked once on every device."""
    from aaac_ao.kernels import verify

    columns = kernel.tiles(columns, group_size)["COLUMNS"]
    return verify.fast_is_right(
        ("annealing", columns), device, lambda: errors_of_both(kernel.anneal, device, columns + 40, 16)
    )


def errors_of_both(
    run: Sweep, device: torch.device, columns: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel and PyTorch make of random rows: [1, 2], their error, and by how much it grew."""
    generator = torch.Generator(device).manual_seed(0)
    rows, groups = 30, -(-columns // group_size)
    draw = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
    x, weight = draw(2 * columns, columns), draw(columns, rows)
    hessian, books = x.t() @ x / len(x), draw(2, 16).sort(dim=1).values
    scale, selector = draw(groups, rows).abs() + 0.1, (draw(groups, rows) > 0).to(torch.uint8)
    grid = Grid(scale, selector, books, group_size)
    codes = (draw(columns, rows).abs() * 6).clamp(max=15).to(torch.uint8)
    pushes, fixed, results = noise(COLD_SWEEPS + 2, columns, device), (books, scale, selector, offsets(weight)), []
    for path in (run, sweep_columns):
        new, values = codes.clone(), grid.values(codes)
        pull = hessian @ (values - weight)
        grew = path(values, new, pull, hessian, pushes, scale[0], *fixed, group_size)
        lost = grid.values(new) - weight
        results.append(torch.stack([((hessian @ lost) * lost).sum(), grew.sum()])[None])
    return results[0], results[1]


def noise(sweeps: int, columns: int, device: torch.device) -> torch.Tensor:
    """[sweeps, K] fp32: even between -1 and 1 at first, then less and less; the same numbers every time."""
    drawn = torch.rand(sweeps, columns, generator=torch.Generator().manual_seed(_SEED)) * 2 - 1
    shares = (1 - torch.arange(sweeps) / max(1, sweeps - COLD_SWEEPS)).clamp(min=0).sqrt()
    return (drawn * shares[:, None]).to(device)


def offsets(weight: torch.Tensor) -> torch.Tensor:
    """[N] int32, where rows begin to read the noise: by their first weight, so that chunks of rows do not show.

    Rows with the same noise would tend to the same errors, which may add up in what the model predicts.
    """
    bits = weight[0].contiguous().view(torch.int32).long()
    return ((bits * 0x9E3779B1 >> 16 & 0x7FFFFFFF) % len(weight)).to(torch.int32)


def sweep_columns(
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
    """The sweeps as the kernels do them, in PyTorch: slow, and there to check the kernels.

    Args:
        values: [K, N] fp32, of the codes; overwritten.
        codes: [K, N] uint8; overwritten.
        pull: [K, N] fp32, H @ (values - weight); overwritten.
        metric: [K, K] fp32, H.
        noise: [sweeps, K] fp32, what is added to the best value of a column, in units of the row's heat over the root
            of H's diagonal.
        heat: [N] fp32 >= 0.
        codebooks: [2, 16] fp32, ascending.
        scale: [groups, N] fp32 >= 0.
        selector: [groups, N] uint8, 0 or 1.
        offset: [N] int32, 0 .. K - 1: the column i of a row has the noise of column i + offset, which goes around.
        group_size: columns per group.

    Returns:
        [N] fp32, by how much the error of a row grew.
    """
    columns, middles = len(metric), (codebooks[:, 1:] + codebooks[:, :-1]) / 2
    grew = torch.zeros_like(heat)
    for pushes in noise:
        for i in range(columns):
            own, second = scale[i // group_size], selector[i // group_size].long()
            push = pushes[(offset + i) % columns] / metric[i, i].sqrt()
            wanted = values[i] - pull[i] / metric[i, i] + heat * push
            codes[i] = (wanted * reciprocal(own) > middles[second].t()).sum(0)
            moved = codebooks[second, codes[i].long()] * own
            change = moved - values[i]
            grew += change * (2 * pull[i] + change * metric[i, i])
            pull.addr_(metric[i], change)
            values[i] = moved
    return grew
