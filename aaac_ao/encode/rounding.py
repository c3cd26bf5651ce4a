"""Rounding of a block of columns under a quadratic error, every group's scale and book included.

Everything here is laid out [columns, N], transposed against the weight: one input channel of all rows is contiguous.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from aaac_ao.encode.scales import reciprocal

#: Most columns of a block, in the C library and the Triton kernel too.
BLOCK_COLUMNS = 256
#: Passes of coordinate descent over the columns of a block, where nothing else is asked for.
SWEEPS = 3


@dataclass(frozen=True)
class Metric:
    """The error of a block, e^T M e for the errors e of its columns.

    Attributes:
        matrix: [B, B] M.
        factor: [B, B] upper Cholesky factor U of the inverse of M, M^-1 = U^T U.
        root: [B, B] lower, the inverse of U^T: e^T M e = |root e|^2.
    """

    matrix: torch.Tensor
    factor: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of_factor(cls, factor: torch.Tensor) -> Metric:
        """From the upper factor R of M = R R^T, or from several of them, [n, B, B], which `split` takes apart."""
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        # solved from the right it takes half the time
        inverse = torch.linalg.solve_triangular(factor.mT, identity, upper=False, left=False).mT.contiguous()
        return cls(factor @ factor.mT, inverse, factor.mT.contiguous())

    @classmethod
    def of_panel(cls, panel: torch.Tensor) -> Metric:
        """Of the first columns of a panel [B, >= B] of rows of a factor."""
        return cls.of_factor(panel[:, : len(panel)])

    def split(self) -> list[Metric]:
        """The metrics of several blocks, one by one."""
        return [Metric(*parts) for parts in zip(self.matrix, self.factor, self.root, strict=True)]


@dataclass(frozen=True)
class Rounded:
    """A block after rounding.

    Attributes:
        codes: [B, N] uint8.
        selector: [groups, N] uint8, 0 or 1: the book of every group.
        scale: [groups, N] fp32, one of the candidates.
        errors: [B, N] fp32, root @ (target - values): its squares add up to the error of a row.
        values: [B, N] fp32, what the columns were rounded to.
    """

    codes: torch.Tensor
    selector: torch.Tensor
    scale: torch.Tensor
    errors: torch.Tensor
    values: torch.Tensor


@functools.lru_cache(maxsize=64)
def _groups_of_columns(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[B] int64; kept, as a copy to an accelerator waits for it."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)


def round_block(
    target: torch.Tensor,
    metric: Metric,
    sizes: Sequence[int],
    codebooks: torch.Tensor,
    candidates: torch.Tensor,
    sweeps: int | None = None,
) -> Rounded:
    """Round the columns of a block to the values of the format so that e^T M e is small, row by row.

    Group after group, every candidate scale is tried with both books: the columns of the group are rounded with
    feedback (GPTQ, arXiv 2210.17323) inside it, which shows the error that the columns behind the group cannot make up
    for; the least one decides. What is lost is fed back to the rest of the block. Then passes of descent set every
    code to its best value with all others fixed.

    Args:
        target: [B, N] fp32, B <= `BLOCK_COLUMNS`.
        metric: of the block.
        sizes: columns of every group, in order; their sum is B.
        codebooks: [2, 16] fp32, ascending.
        candidates: [count, groups, N] fp32 >= 0, scales that are tried; the first wins ties.
        sweeps: passes of descent; `SWEEPS` if None.
    """
    from aaac_ao.kernels.cpu import rounding as compiled

    sweeps = SWEEPS if sweeps is None else sweeps

    if target.device.type == "cpu" and compiled.library() is not None:
        ends = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        parts = (metric.factor, metric.matrix, metric.root, codebooks, candidates, ends)
        return Rounded(*compiled.round_block(target, *parts, sweeps))
    kernel = triton_kernel("rounding") if target.is_cuda else None
    if kernel is not None and _is_right(kernel, target.device, len(target), max(sizes)):
        return round_with(kernel, target, metric, sizes, codebooks, candidates, sweeps)
    return _round_block(target, metric, sizes, codebooks, candidates, sweeps)


@functools.cache
def triton_kernel(name: str) -> ModuleType | None:
    """The module of a Triton kernel in `aaac_ao.kernels`, or None without Triton."""
    try:
        return importlib.import_module(f"aaac_ao.kernels.{name}")
    except ImportError:
        return None


def round_with(
    kernel: ModuleType,
    target: torch.Tensor,
    metric: Metric,
    sizes: Sequence[int],
    codebooks: torch.Tensor,
    candidates: torch.Tensor,
    sweeps: int = SWEEPS,
) -> Rounded:
    """`round_block` by the module of a kernel."""
    parts = (metric.factor, metric.matrix, metric.root, codebooks, candidates)
    codes, selector, scale, errors = kernel.round_block(target, *parts, sizes, sweeps)
    of_column = _groups_of_columns(tuple(sizes), target.device)
    values = codebooks.view(-1)[codes.long() + 16 * selector.long()[of_column]] * scale[of_column]
    return Rounded(codes, selector, scale, errors, values)


def _is_right(kernel: ModuleType, device: torch.device, columns: int, group_size: int) -> bool:
    """Whether the kernel, as compiled for such blocks, rounds as well as PyTorch; checked once on every device."""
    from aaac_ao.kernels import verify

    tiles = kernel.tiles(columns, group_size)
    columns, group_size = tiles["COLUMNS"], tiles["GROUP"]
    variant = ("rounding", columns, group_size)
    return verify.fast_is_right(variant, device, lambda: errors_of_both(kernel, device, columns, group_size))


def errors_of_both(
    kernel: ModuleType, device: torch.device, columns: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of random rows after rounding by the kernel and by PyTorch: [1, 2], as computed here and as returned."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [group_size] * (columns // group_size)
    sizes[-1] -= 3
    columns -= 3
    target, noise = (torch.randn(columns, n, generator=generator, device=device) for n in (30, columns))
    factor = torch.eye(columns, device=device) + noise.triu(1) / columns**0.5
    books = torch.randn(2, 16, generator=generator, device=device).sort(dim=1).values
    scale = torch.stack([part.abs().amax(0) for part in target.split(sizes)])
    candidates = torch.stack([scale * share for share in (0.3, 0.4, 0.5, 0.6, 0.7)])
    problem = (target, Metric.of_factor(factor), sizes, books, candidates)
    errors = []
    for rounded in (round_with(kernel, *problem), _round_block(*problem)):
        lost = target - rounded.values
        both = (((problem[1].matrix @ lost) * lost).sum(), rounded.errors.square().sum())
        errors.append(torch.stack(both)[None])
    return errors[0], errors[1]


def _round_block(
    target: torch.Tensor,
    metric: Metric,
    sizes: Sequence[int],
    codebooks: torch.Tensor,
    candidates: torch.Tensor,
    sweeps: int = SWEEPS,
) -> Rounded:
    left, codes = target.clone(), torch.empty_like(target, dtype=torch.int64)
    value, scales, selectors = torch.empty_like(target), [], []
    inverse_diagonal = metric.factor.diagonal().reciprocal()
    books, start = _Books(codebooks), 0
    for group, size in enumerate(sizes):
        columns = slice(start, start + size)
        scale, book = _choose(left[columns], metric.factor[columns, columns], books, candidates[:, group])
        scales.append(scale)
        selectors.append(book)
        inverse = reciprocal(scale)
        for i in range(start, start + size):
            codes[i], entry = books.nearest(left[i] * inverse, book)
            value[i] = entry * scale
            error = (left[i] - value[i]) * inverse_diagonal[i]
            left[i + 1 :].addr_(metric.factor[i, i + 1 :], error, alpha=-1)
        start += size
    pull = metric.matrix @ (target - value)
    steps = metric.matrix.diagonal().reciprocal()
    of_column = [group for group, size in enumerate(sizes) for _ in range(size)]
    inverses = [reciprocal(scale) for scale in scales]
    for _ in range(sweeps):
        for i, group in enumerate(of_column):
            best = (value[i] + pull[i] * steps[i]) * inverses[group]
            codes[i], entry = books.nearest(best, selectors[group])
            moved = entry * scales[group]
            pull.addr_(metric.matrix[i], moved - value[i], alpha=-1)
            value[i] = moved
    errors = metric.root @ (target - value)
    return Rounded(codes.to(torch.uint8), torch.stack(selectors).to(torch.uint8), torch.stack(scales), errors, value)


def _choose(
    target: torch.Tensor, factor: torch.Tensor, books: _Books, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale [N] and book [N] int64 of a group with which feedback inside it leaves the least error."""
    scale = candidates[:, None].expand(-1, 2, -1)
    inverse = reciprocal(scale)
    left = target[:, None, None].expand(-1, *scale.shape).clone()
    book = torch.arange(2, device=target.device)[None, :, None].expand(scale.shape)
    cost = torch.zeros_like(left[0])
    for i in range(len(target)):
        error = (left[i] - books.nearest(left[i] * inverse, book)[1] * scale) / factor[i, i]
        cost += error.square()
        left[i + 1 :] -= factor[i, i + 1 :, None, None, None] * error
    best = cost.flatten(0, 1).argmin(0, keepdim=True)
    return scale.flatten(0, 1).gather(0, best)[0], best[0] % 2


class _Books:
    """Nearest entries in a pair of ascending books; ties go to the lower entry."""

    def __init__(self, codebooks: torch.Tensor) -> None:
        self.entries = codebooks.reshape(-1)
        self.middles = (codebooks[:, 1:] + codebooks[:, :-1]) / 2

    def nearest(self, x: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int64 and entries nearest to x in its book, int64 of the same shape."""
        first, second = (torch.bucketize(x, middles) for middles in self.middles)
        codes = torch.where(book == 1, second, first)
        return codes, torch.index_select(self.entries, 0, (codes + 16 * book).view(-1)).view(x.shape)
