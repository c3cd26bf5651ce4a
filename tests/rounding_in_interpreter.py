"""Run the encoder's rounding kernel in Triton's interpreter, and print as JSON how far it is from plain fp64.

    TRITON_INTERPRET=1 python tests/rounding_in_interpreter.py SEED

Each result is {"kind", "case", "ratio"}: a difference over its bound. A right kernel has ratios up to 1; the results of
kind "broken" come from a damaged input and must be above 1.
"""

from __future__ import annotations

import json
import math
import random
import sys

import torch
from encode_oracle import upper_root

from aaac_ao.encode import rounding
from aaac_ao.encode.rounding import Metric, Rounded
from aaac_ao.kernels import rounding as kernel
from aaac_ao.kernels import verify

#: Rows, columns of every group, candidates: ragged groups anywhere, one candidate up to more than a warp tries at once.
BLOCKS = (
    (5, [16, 16, 5], 3),
    (1, [16], 1),
    (9, [1], 5),
    (3, [7, 20, 9], 4),
    (2, [65], 2),
    (6, [40], 9),
    (3, [16] * 4, 7),
)
#: Share of codes that may differ from plain fp64's, where two values are nearly as good.
CODES = 0.01


def block_of(rows: int, sizes: list[int], count: int):
    """A target, its metric, books, and candidates around the size of the target."""
    columns = sum(sizes)
    target = torch.randn(columns, rows) * torch.randn(rows).exp()
    x = torch.randn(3 * columns + 20, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    x = x.double()  # mixing may be all but singular
    metric = Metric.of_factor(upper_root(x.T @ x / len(x)).float())
    books = torch.randn(2, 16).sort(dim=1).values
    scale = torch.stack([part.abs().amax(0) for part in target.split(sizes)])
    share = torch.linspace(0.3, 0.9, count)[torch.randperm(count)]
    return target, metric, sizes, books, scale * share[:, None, None]


def plain(target, metric: Metric, sizes, books, candidates, sweeps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values [B, N] by the definition, in fp64, from the metric alone.

    With columns s rounded and V = M^-1, the columns r behind them are best at target - V_rs V_ss^-1 e_s, which leaves
    the error e_s^T V_ss^-1 e_s.
    """
    target, matrix = target.double(), metric.matrix.double()
    inverse, books, candidates = torch.linalg.inv(matrix), books.double(), candidates.double()
    value, codes = target.clone(), torch.zeros(target.shape, dtype=torch.long)
    grids, first = [], 0
    for group, size in enumerate(sizes):
        trials = []
        for scale in candidates[:, group]:
            for book in books:
                trials.append(_fed(target, value, inverse, first, first + size, scale * book[:, None]))
        best = torch.stack([cost for _, _, cost, _ in trials]).argmin(0)
        values, entries, _, grid = (torch.stack(parts) for parts in zip(*trials, strict=True))
        rows = torch.arange(target.shape[1])
        value, part = values[best, :, rows].T.clone(), slice(first, first + size)
        codes[part] = entries[best, :, rows].T[part]
        grids += [grid[best, :, rows].T] * size
        first += size
    for _ in range(sweeps):
        for i, grid in enumerate(grids):
            lost = target - value
            lost[i] = 0
            own = target[i] - grid
            codes[i] = (matrix[i, i] * own.square() + 2 * own * (matrix[i] @ lost)).argmin(0)
            value[i] = grid.gather(0, codes[i][None])[0]
    return codes, value


def _fed(target, value, inverse, first: int, end: int, grid):
    """Values and codes [B, N] with columns first..end rounded to a grid [16, N] in turn, the error, and the grid."""
    value, codes = value.clone(), torch.zeros(value.shape, dtype=torch.long)
    for i in range(first, end):
        wanted = target[i]
        if i:
            wanted = wanted - inverse[i, :i] @ torch.linalg.solve(inverse[:i, :i], (target - value)[:i])
        codes[i] = (wanted - grid).abs().argmin(0)
        value[i] = grid.gather(0, codes[i][None])[0]
    lost = (target - value)[:end]
    return value, codes, (lost * torch.linalg.solve(inverse[:end, :end], lost)).sum(0), grid


def rounded_by_kernel(target, metric: Metric, sizes, books, candidates, sweeps: int) -> Rounded:
    return rounding.round_with(kernel, target, metric, sizes, books, candidates, sweeps)


def error_of(value, target, metric: Metric) -> torch.Tensor:
    """e^T M e of every row, fp64."""
    lost = target.double() - value.double()
    return ((metric.matrix.double() @ lost) * lost).sum(0)


def compared(rounded: Rounded, block, sweeps: int) -> dict[str, float]:
    """Differences from plain fp64, and of what comes back from itself, each over its bound."""
    target, metric, _, _, candidates = block
    codes, value = plain(*block, sweeps)
    exact = error_of(value, target, metric).sum()
    error = error_of(rounded.values, target, metric)
    returned = rounded.errors.double().square().sum(0)
    chosen = bool((rounded.scale == candidates).any(0).all()) and int(rounded.selector.max()) <= 1
    return {
        "codes": (rounded.codes != codes).double().mean().item() / CODES,
        "error": (error.sum() / exact - 1).abs().item() / 1e-3,
        "returned errors": ((returned - error).abs() / (1e-4 * error)).max().item(),
        "choices": 0.0 if chosen else math.inf,
    }


def rounding_results():
    for index, (rows, sizes, count) in enumerate(BLOCKS):
        block, sweeps = block_of(rows, sizes, count), (3, 0, 1)[index % 3]
        case = f"N={rows} sizes={sizes} candidates={count} sweeps={sweeps}"
        rounded = rounded_by_kernel(*block, sweeps)
        for kind, ratio in compared(rounded, block, sweeps).items():
            yield {"kind": kind, "case": case, "ratio": ratio}
        again = rounded_by_kernel(*block, sweeps)
        same = all(torch.equal(part, vars(rounded)[name]) for name, part in vars(again).items())
        yield {"kind": "again", "case": case, "ratio": 0.0 if same else math.inf}


def zero_results():
    """Rows and scales of zeros, and scales without a finite reciprocal, as in PyTorch."""
    target, metric, sizes, books, candidates = block_of(6, [16, 8], 3)
    target[:, 3], candidates[:, :, 3], candidates[:, 0, 5] = 0, 0, 1e-40
    rounded = rounded_by_kernel(target, metric, sizes, books, candidates, 3)
    expected = rounding._round_block(target, metric, sizes, books, candidates)
    right = all(torch.equal(part, vars(expected)[name]) for name, part in vars(rounded).items() if name != "errors")
    close = torch.allclose(rounded.errors, expected.errors, rtol=1e-4, atol=1e-5)
    yield {"kind": "zeros", "case": "zeros", "ratio": 0.0 if right and close else math.inf}


def check_results():
    """The encoder's check before it uses the kernel: whether both paths agree, and whether it sees where not."""
    for columns, group_size in ((16, 16), (32, 16)):
        both = rounding.errors_of_both(kernel, torch.device("cpu"), columns, group_size)
        fine = verify._compare("rounding", lambda both=both: both)
        yield {"kind": "check", "case": f"{columns} {group_size}", "ratio": 0.0 if fine else math.inf}
    whole = kernel.round_block

    def without_descent(*args):
        return whole(*args[:-1], 0)

    kernel.round_block = without_descent
    both = rounding.errors_of_both(kernel, torch.device("cpu"), 16, 16)
    kernel.round_block = whole
    fine = verify._compare("rounding", lambda: both)
    yield {"kind": "broken", "case": "check without descent", "ratio": 0.0 if fine else math.inf}


def broken_results():
    """The same comparison after a damage to what the kernel gets; the worst of its ratios."""
    block = block_of(6, [16, 9], 4)
    target, metric, sizes, books, candidates = block
    damages = {
        "factor": (target, Metric(metric.matrix, metric.factor.t(), metric.root), sizes, books, candidates),
        "matrix": (target, Metric(metric.matrix.triu(), metric.factor, metric.root), sizes, books, candidates),
        "root": (target, Metric(metric.matrix, metric.factor, metric.root * 1.01), sizes, books, candidates),
        "sizes": (target, metric, sizes[::-1], books, candidates),
        "books": (target, metric, sizes, books + 0.05, candidates),
        "candidates": (target, metric, sizes, books, candidates.flip(1)),
    }
    for case, damaged in damages.items():
        worst = max(compared(rounded_by_kernel(*damaged, 3), block, 3).values())
        yield {"kind": "broken", "case": case, "ratio": worst}


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1])), random.seed(int(sys.argv[1]))
    torch.set_num_threads(1)
    parts = (rounding_results, zero_results, check_results, broken_results)
    json.dump([result for part in parts for result in part()], sys.stdout, allow_nan=True)
