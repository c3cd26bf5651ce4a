"""Nearest-entry search in 16-entry books: exact codes, and fine tables for the encoder's many approximate searches.

The distance of a scalar to its nearest entry depends on the scalar alone, so a table over fine bins replaces the search
wherever only the error counts (choosing books and scales, k-means). Codes that are stored come from `nearest_codes`,
which is exact.
"""

from __future__ import annotations

import torch

BINS = 4096
#: A table covers [-RANGE, RANGE] times the magnitude onto which a group's largest weight is mapped.
RANGE = 1.6


class NearestTable:
    """Nearest codes and squared distances of a sorted pair of books, tabulated over `BINS` bins.

    Args:
        codebooks: [2, 16] fp32, each book ascending.
        top: magnitude onto which a group's largest weight is mapped, in the units of the books.
    """

    def __init__(self, codebooks: torch.Tensor, top: float) -> None:
        self.step = 2 * RANGE * top / BINS
        bins = torch.arange(BINS, device=codebooks.device, dtype=torch.float32)
        self.centers = (bins + 0.5 - BINS / 2) * self.step
        self.codes = torch.stack([_search(self.centers, book) for book in codebooks])
        self.squared_error = (torch.gather(codebooks, 1, self.codes) - self.centers).square()

    def bins(self, u: torch.Tensor) -> torch.Tensor:
        """Bin of every element of `u` as int32; values outside the range fall into the outermost bins."""
        position = torch.add(u.new_full((), BINS / 2), u, alpha=1 / self.step)
        return position.clamp_(0, BINS - 1).to(torch.int32)

    def group_errors(self, bins: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """Weighted squared error of every group under each book.

        Args:
            bins: [rows, groups, group_size] from `bins`.
            importance: [groups, group_size] weight of every input channel.

        Returns:
            [2, rows, groups], in squared book units.
        """
        flat = bins.reshape(-1)
        errors = [torch.index_select(table, 0, flat).view(bins.shape) for table in self.squared_error]
        return torch.stack([error.mul_(importance).sum(-1) for error in errors])


def nearest_codes(u: torch.Tensor, table: NearestTable, book: torch.Tensor, index: int) -> torch.Tensor:
    """Exact nearest entries of an ascending book, int32 codes in the shape of `u`; ties go to the lower entry.

    Args:
        u: values in book units.
        table: a table that holds the book, for the first guess.
        book: [16] ascending.
        index: which book of the table it is.
    """
    infinity = book.new_full((1,), float("inf"))
    midpoints = (book[1:] + book[:-1]) / 2
    upper, lower = torch.cat([midpoints, infinity]), torch.cat([-infinity, midpoints])
    flat = u.reshape(-1)
    codes = torch.index_select(table.codes[index].to(torch.int32), 0, table.bins(flat))
    for _ in range(len(book)):  # the guess is off by an entry near a midpoint, by more only if entries share a bin
        move = (flat > torch.index_select(upper, 0, codes)).to(torch.int32)
        move -= (flat <= torch.index_select(lower, 0, codes)).to(torch.int32)
        if not bool(move.any()):
            break
        codes += move
    return codes.view(u.shape)


def _search(u: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(u, (book[1:] + book[:-1]) / 2)
