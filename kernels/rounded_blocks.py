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
        parts: what `round_block` and `sweep_columns` of `aaac_ao.encode` take.

    Raises:
        ValueError: a part that is not fp32 (codes and selectors: uint8, offsets: int32), has another shape or lies
            elsewhere.
    """
    shapes = dict.fromkeys(("factor", "metric", "root"), (columns, columns))
    shapes |= dict.fromkeys(("target", "values", "codes", "pull"), (columns, rows))
    shapes |= dict.fromkeys(("scale", "selector"), (groups, rows)) | {"candidates": (None, groups, rows)}
    shapes |= {"codebooks": (2, 16), "noise": (None, columns), "heat": (rows,), "offset": (rows,)}
    dtypes = {"codes": torch.uint8, "selector": torch.uint8, "offset": torch.int32}
    for name, tensor in parts.items():
        dtype = dtypes.get(name, torch.float32)
        shape = tuple(size if size is not None else len(tensor) for size in shapes[name])
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {device}, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )


def check_annealing(device: torch.device, group_size: int, **parts: torch.Tensor) -> None:
    """Reject what a kernel cannot anneal: `check_parts` for a whole weight, whose outputs it overwrites.

    Args:
        device: where all parts must be.
        group_size: columns per group.
        parts: all that `sweep_columns` of `aaac_ao.encode` takes.

    Raises:
        ValueError: as for `check_parts`, a group_size that is not positive, or outputs that are not contiguous.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be positive, got {group_size}")
    columns, rows = len(parts["metric"]), len(parts["heat"])
    check_parts(columns, rows, -(-columns // group_size), device, **parts)
    if not all(parts[name].is_contiguous() for name in ("values", "codes", "pull")):
        raise ValueError("values, codes and pull must be contiguous, as they are overwritten")
