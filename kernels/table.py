"""Which kernel for how many tokens, and how many programs: by shape and GPU, never by trying out in the hot path."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from dataclasses import asdict, dataclass

import torch

from .blocks import BLOCKS

TABLES = pathlib.Path(__file__).with_name("tables")


@dataclass(frozen=True)
class Limits:
    """What depends on the GPU.

    Attributes:
        fused_tokens: most tokens for which decoding inside the product beats dequantising first; at most 64.
        programs: programs per multiprocessor up to which K is split.
        pair_weights: fewest weights of a layer for which the pair table is worth filling; None for never.
        slab_bytes: dequantised weights held at a time, so that they stay in the L2 cache.
    """

    fused_tokens: int = 64
    programs: int = 8
    pair_weights: int | None = None
    slab_bytes: int = 32 * 2**20

    def __post_init__(self):
        if not 0 <= self.fused_tokens <= BLOCKS[-1].tokens:
            raise ValueError(f"fused_tokens must be 0 to {BLOCKS[-1].tokens}, got {self.fused_tokens}")
        if self.programs < 1 or self.slab_bytes < 1:
            raise ValueError(f"programs and slab_bytes must be positive, got {self.programs} and {self.slab_bytes}")


#: By compute capability, from instruction counts and published figures of other kernels; nothing here was measured yet.
#: A file in `tables/`, as `benchmarks/tune.py` writes it, goes before this.
TABLE = {
    (9, 0): Limits(pair_weights=2**25),
    (10, 0): Limits(fused_tokens=32, pair_weights=2**25, slab_bytes=64 * 2**20),
    (10, 3): Limits(fused_tokens=32, pair_weights=2**25, slab_bytes=64 * 2**20),
}
#: Fewest steps of a program along K, and most ranges of K.
MIN_STEPS, MAX_SPLITS = 2, 16


def slug(name: str) -> str:
    """File name of a GPU's table: lower case, everything but letters and digits a dash."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(name: str) -> Limits | None:
    """The shipped `Limits` of the GPU called `name`, if there are any.

    Raises:
        ValueError: the file does not hold `Limits`.
    """
    path = TABLES / f"{slug(name)}.json"
    if not path.exists():
        return None
    try:
        return Limits(**json.loads(path.read_text())["limits"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table as benchmarks/tune.py writes it: {error}") from error


def write(name: str, limits: Limits, measured: dict) -> pathlib.Path:
    """Write the table of the GPU called `name`, with the measurements that it comes from; returns its path."""
    TABLES.mkdir(exist_ok=True)
    path = TABLES / f"{slug(name)}.json"
    path.write_text(json.dumps({"limits": asdict(limits), "gpu": name, "measured": measured}, indent=1) + "\n")
    return path


@functools.cache
def of_device(device: torch.device) -> tuple[Limits, int]:
    """`Limits` and the number of multiprocessors of a device; a CPU (Triton's interpreter) gets the defaults and 16."""
    if device.type != "cuda":
        return Limits(), 16
    properties = torch.cuda.get_device_properties(device)
    limits = read(properties.name) or TABLE.get((properties.major, properties.minor)) or Limits()
    return limits, properties.multi_processor_count


def choose_splits(programs: int, steps: int, wanted: int) -> int:
    """Ranges of K side by side: a power of two that makes `wanted` programs and leaves every range MIN_STEPS steps."""
    splits = 1
    while splits < MAX_SPLITS and programs * splits < wanted and steps >= 2 * splits * MIN_STEPS:
        splits *= 2
    return splits


def choose_even_splits(row_blocks: int, steps: int, programs: int) -> int:
    """Ranges of K for `programs` persistent programs: the number with which the busiest has the fewest steps to do."""

    def busiest(splits: int) -> int:
        return -(-row_blocks * splits // programs) * (-(-steps // splits) + 1)  # starting a range takes about a step

    return min(range(1, min(MAX_SPLITS, max(steps // MIN_STEPS, 1)) + 1), key=busiest)
