"""Nearest-entry search in 16-entry books: exact codes, and fine tables for the encoder's many approximate searches.

The distance of a scalar to its nearest entry depends on the scalar alone, so a table over fine bins replaces the search
wherever only the error counts (choosing books and scales, k-means). Codes that are stored come from `nearest_codes`,
which is exact.
"""

from __future__ import annotations

import functools

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
        self.codebooks = codebooks
        self.reach, self.step = RANGE * top, 2 * RANGE * top / BINS
        self.centers = bin_centers(RANGE * top, codebooks.device)
        self.codes = torch.stack([_search(self.centers, book) for book in codebooks])
        self.squared_error = (torch.gather(codebooks, 1, self.codes) - self.centers).square()

    def bins(self, u: torch.Tensor) -> torch.Tensor:
        """Bin of every element of `u` as int32; values outside the range fall into the outermost bins."""
        return bins_of(u, self.reach)

    @functools.cached_property
    def lowest_codes(self) -> tuple[torch.Tensor, int]:
        """The lowest codes [2, BINS] int32 that are nearest in a bin, and how far above them the highest may be."""
        reach = 0.51 * self.step  # a value's bin is known up to rounding only
        low, high = (torch.stack([_search(self.centers + r, book) for book in self.codebooks]) for r in (-reach, reach))
        low[:, 0], high[:, -1] = 0, self.codebooks.shape[1] - 1  # the outermost bins take everything beyond them
        return low.to(torch.int32), int((high - low).max())

    def group_errors(self, bins: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """Weighted squared error of every group under each book.

        Args:
            bins: [..., group_size] from `bins`.
            importance: weight of every element, of that shape or broadcast to it.

        Returns:
            [2, ...], in squared book units.
        """
        return weighted_sums(bins, importance, self.squared_error.t().contiguous()).movedim(-1, 0)


def bin_centers(reach: float, device: torch.device) -> torch.Tensor:
    """[BINS] fp32 centres of equal bins over [-reach, reach]."""
    bins = torch.arange(BINS, device=device, dtype=torch.float32)
    return (bins + 0.5 - BINS / 2) * (2 * reach / BINS)


def bins_of(u: torch.Tensor, reach: float) -> torch.Tensor:
    """Index int32 of the bin of every element; what lies outside [-reach, reach] falls into the outermost bins."""
    position = torch.add(u.new_full((), BINS / 2), u, alpha=BINS / (2 * reach))
    return position.clamp_(0, BINS - 1).to(torch.int32)


def weighted_sums(bins: torch.Tensor, importance: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sums over every group of importance times the table's row of each element.

    This is a bag of embeddings, whose kernels add up whole rows in little more time than single numbers.

    Args:
        bins: [..., group_size] int32, rows of the table.
        importance: weight of every element, of that shape or broadcast to it.
        table: [BINS, columns] fp32, contiguous.

    Returns:
        [..., columns].
    """
    size = bins.shape[-1]
    weights = importance.expand_as(bins).reshape(-1, size)
    sums = torch.nn.functional.embedding_bag(bins.view(-1, size), table, mode="sum", per_sample_weights=weights)
    return sums.view(*bins.shape[:-1], -1)


def nearest_codes(u: torch.Tensor, table: NearestTable, book: torch.Tensor, index: int) -> torch.Tensor:
    """Exact nearest entries of an ascending book, int32 codes in the shape of `u`; ties go to the lower entry.

    Args:
        u: values in book units.
        table: a table that holds the book, for the lowest code that comes into question.
        book: [16] ascending.
        index: which book of the table it is.
    """
    upper = torch.cat([(book[1:] + book[:-1]) / 2, book.new_full((1,), float("inf"))])
    lowest, steps = table.lowest_codes
    flat = u.reshape(-1)
    codes = torch.index_select(lowest[index], 0, table.bins(flat))
    for _ in range(steps):
        codes += flat > torch.index_select(upper, 0, codes)
    return codes.view(u.shape)


def _search(u: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(u, (book[1:] + book[:-1]) / 2)
