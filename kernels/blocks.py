"""How the kernels for few tokens cut their work. Fixed by the instruction budgets of `benchmarks/budgets.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """How `fused_kernel` cuts its work.

    Attributes:
        tokens: tokens of a program, BLOCK_M.
        row_tiles: rows of a program, in tiles of 16.
        tiles: columns of a step, in tiles of 64.
    """

    tokens: int
    row_tiles: int
    tiles: int


#: The first block with enough tokens is used.
BLOCKS = (Block(8, 1, 4), Block(16, 2, 4), Block(32, 2, 2), Block(64, 2, 2))


def block_for(tokens: int) -> Block:
    """The block for 1 <= `tokens` <= 64."""
    return next(block for block in BLOCKS if tokens <= block.tokens)


def scales_weights(block: Block, group_size: int) -> bool:
    """Whether |scale| * entry is rounded to x's dtype before the product, as if the weight had been dequantised to it.

    Otherwise scales multiply fp32 sums. With groups of 16 a tensor-core step spans two groups, and the more tokens, the
    more instructions and registers the sums of every group take.
    """
    return group_size == 16 or block.tokens > 16 or (block.tokens > 8 and group_size < 128)
