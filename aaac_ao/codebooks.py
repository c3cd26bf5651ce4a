"""Fixed 16-entry codebooks, all exact in bf16 or rounded to it, and the pairs they form.

A pair is a tensor [2, 16]; entries need not be sorted or distinct. The encoder maps a group's largest weight onto the
largest magnitude of the pair, so the units of a pair are free.
"""

from __future__ import annotations

import torch

# OCP Microscaling E2M1; both zeros are kept, as in the format.
_FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Symmetric INT4: the largest weight of a group maps to +-7, so -8 is stored but never the nearest level.
_INT4 = tuple(float(i) for i in range(-8, 8))
# QLoRA (arXiv 2305.14314), appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# BOF4 (arXiv 2505.06653), table 8: MSE, blocks of 64.
_BOF4 = (
    -1.0, -0.75352454, -0.57920372, -0.43859988, -0.31676799, -0.20599245, -0.10153876, 0.0,
    0.08872453, 0.17937696, 0.27414998, 0.37582114, 0.48849377, 0.61870587, 0.77904522, 1.0,
)  # fmt: skip
# BOF4-S (arXiv 2505.06653), table 7: MSE, signed absmax normalisation, by block size.
_BOF4_S = {
    32: (
        -0.87327975, -0.69074464, -0.54370391, -0.41737017, -0.30389336, -0.19860178, -0.09815572, 0.0,
        0.09259384, 0.18704800, 0.28551975, 0.39071262, 0.50628316, 0.63797486, 0.79563767, 1.0,
    ),
    64: (
        -0.85684639, -0.66928744, -0.52352661, -0.40048826, -0.29106382, -0.19000930, -0.09385296, 0.0,
        0.08876717, 0.17948027, 0.27430961, 0.37601975, 0.48865300, 0.61886036, 0.77913958, 1.0,
    ),
    128: (
        -0.83739173, -0.64624524, -0.50286347, -0.38362476, -0.27837795, -0.18157139, -0.08964773, 0.0,
        0.08509156, 0.17208348, 0.26320729, 0.36132932, 0.47074527, 0.59889668, 0.76102799, 1.0,
    ),
}  # fmt: skip

#: Names accepted by `AAACConfig.codebooks` besides "learned".
FIXED_CODEBOOKS = ("int4", "fp4", "nf4", "bof4", "bof4-s", "if4")


def mirror(book: torch.Tensor) -> torch.Tensor:
    """The pair of a book [16] and its negation, [2, 16]."""
    return torch.stack([book, -book])


def fixed_codebooks(name: str, group_size: int) -> torch.Tensor:
    """A fixed pair, fp32 [2, 16] with values exact in bf16. One-book grids are returned twice.

    Args:
        name: one of `FIXED_CODEBOOKS`.
        group_size: weights per scale; chooses BOF4-S's table (16 takes the one for 32, the smallest published).

    Raises:
        ValueError: unknown name.
    """
    if name == "if4":
        # arXiv 2603.28765: FP4, or INT4 times 6/7. In units of 1/7 both are exact in bf16.
        pair = torch.stack([torch.tensor(_FP4) * 7, torch.tensor(_INT4) * 6])
    elif name == "bof4-s":
        pair = mirror(torch.tensor(_BOF4_S[min(max(group_size, 32), 128)]))
    elif name in FIXED_CODEBOOKS:
        book = torch.tensor({"int4": _INT4, "fp4": _FP4, "nf4": _NF4, "bof4": _BOF4}[name])
        pair = torch.stack([book, book])
    else:
        raise ValueError(f"unknown codebooks {name!r}; known: 'learned', {', '.join(map(repr, FIXED_CODEBOOKS))}")
    return pair.bfloat16().float()


def top_of(name: str) -> float:
    """The magnitude onto which a group's largest weight is mapped for a fixed pair: 7 of INT4's -8..7."""
    return {"int4": 7.0, "fp4": 6.0, "if4": 42.0}.get(name, 1.0)


def learned_start() -> torch.Tensor:
    """Start of the learned pair: NF4 and its mirror. A symmetric start would stay symmetric and end worse."""
    return mirror(torch.tensor(_NF4))
