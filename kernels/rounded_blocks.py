"""What the encoder's kernels ask of a block of columns, the C library and Triton alike."""

from __future__ import annotations

import torch

#: Most columns of a block.
MOST_COLUMNS = 256


def check_parts(columns: int, rows: int, groups: int, device: torch.device, **parts: torch.Tensor) -> None:
    """Reject parts of a block, by name, whose bytes a kernel would misread or read beyond.

    Args:
        columns: of the block.
        rows: of the weight.
        groups: of the block.
        device: where all parts must be.
        parts: among "target", "factor", "metric", "root", "codebooks" and "candidates".

    Raises:
        ValueError: a part that is not fp32, has another shape or lies elsewhere.
    """
    shapes = dict.fromkeys(("factor", "metric", "root"), (columns, columns))
    shapes |= {"target": (columns, rows), "codebooks": (2, 16), "candidates": (None, groups, rows)}
    for name, tensor in parts.items():
        shape = tuple(size if size is not None else len(tensor) for size in shapes[name])
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != device:
            raise ValueError(
                f"{name} must be fp32 {list(shape)} on {device}, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
