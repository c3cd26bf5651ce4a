"""The values that a weight can take.

Everything here is laid out [K, N], transposed against the weight: one input channel of all rows is contiguous.
"""

from __future__ import annotations

import torch

#: Columns whose indices and values are worked on at a time.
CHUNK_COLUMNS = 128


class Grid:
    """The values that every weight can take: its group's scale times the entries of its group's book.

    Args:
        scale: [groups, N] fp32 >= 0.
        selector: [groups, N] uint8, the book of every group.
        codebooks: [2, 16] fp32, ascending.
        group_size: columns per group.
    """

    def __init__(self, scale: torch.Tensor, selector: torch.Tensor, codebooks: torch.Tensor, group_size: int) -> None:
        self.scale, self.selector, self.codebooks, self.group_size = scale, selector, codebooks, group_size
        self.entries = codebooks.reshape(-1)

    def index(self, codes: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Where the entries of codes [columns, N], from the first of a group on, stand among the 32 of both books."""
        return codes.long() + 16 * of_columns(self.selector[start // self.group_size :], len(codes), self.group_size)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """[K, N] values of codes [K, N]."""
        values = torch.empty(codes.shape, device=codes.device)
        for start in range(0, len(codes), CHUNK_COLUMNS):  # indices take four times the memory of values
            block, groups = codes[start : start + CHUNK_COLUMNS], slice(start // self.group_size, None)
            scale = of_columns(self.scale[groups], len(block), self.group_size)
            torch.mul(self.entries[self.index(block, start)], scale, out=values[start : start + CHUNK_COLUMNS])
        return values

    def column_scales(self, columns: int) -> torch.Tensor:
        """[K, N] the scale of every weight."""
        return of_columns(self.scale, columns, self.group_size)


def of_columns(of_groups: torch.Tensor, columns: int, group_size: int) -> torch.Tensor:
    """[columns, N] for every column what [groups, N] has for its group."""
    groups = -(-columns // group_size)
    return of_groups[:groups].repeat_interleave(group_size, dim=0)[:columns]
