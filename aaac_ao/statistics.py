"""Statistics of layer inputs as a file: sums, so that files made by many processes add up to one.

A file is in safetensors format. Layers that read the same input share one entry: `<first layer>.squares` [K],
`.tokens` and, unless only the diagonal was wanted, `.hessian` [K, K]; the metadata maps every layer to its entry.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from aaac_ao.encode import Statistics
from aaac_ao.moments import InputSums

_FORMAT = "aaac_ao statistics 1"
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


class StatisticsFile:
    """Read access to a file, one entry at a time.

    Raises:
        ValueError: not such a file, or a damaged one.
        FileNotFoundError: there is no file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no statistics file {self.path}")
        try:
            self._file = safe_open(self.path, "pt")
            metadata = self._file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{self.path} is no statistics file or damaged: {error}") from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{self.path} is no statistics file of this version of aaac_ao")
        #: layer name -> name of its entry
        self.layers: dict[str, str] = json.loads(metadata["layers"])
        self.full = metadata["full"] == "True"

    def sums(self, entry: str) -> InputSums:
        """The sums of an entry, on the CPU."""
        squares, tokens = (self._file.get_tensor(f"{entry}.{part}") for part in ("squares", "tokens"))
        return InputSums(squares, tokens, self._file.get_tensor(f"{entry}.hessian") if self.full else None)

    def statistics(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Statistics]:
        """Statistics of those of the layers that the file knows, one object for layers that share an input.

        Raises:
            ValueError: an entry has NaN or infinite values; the message names the layers.
        """
        found: dict[str, Statistics] = {}
        loaded: dict[str, Statistics] = {}
        for name in names:
            entry = self.layers.get(name)
            if entry is None:
                continue
            if entry not in loaded:
                means = self.sums(entry).statistics(in_place=True)
                hessian = None if means.hessian is None else means.hessian.to(device)
                loaded[entry] = Statistics(means.second_moment.to(device), means.tokens, hessian)
                parts = [loaded[entry].second_moment] + ([] if hessian is None else [hessian])
                if not all(bool(torch.isfinite(part).all()) for part in parts):
                    raise ValueError(f"{self.path}: the statistics of {name} have NaN or infinite values")
            found[name] = loaded[entry]
        return found

    def check_shapes(self, in_features: Mapping[str, int]) -> None:
        """Refuse a file of another model.

        Raises:
            ValueError: the statistics of a layer are not those of its number of inputs.
        """
        for name, k in in_features.items():
            if name in self.layers:
                shape = self._file.get_slice(f"{self.layers[name]}.squares").get_shape()
                if shape != [k]:
                    raise ValueError(f"{self.path} has statistics of {shape} inputs for {name}, which has {k}")

    def stages(self, names: Iterable[str]) -> list[list[str]]:
        """The layers in groups that share an input."""
        groups: dict[str, list[str]] = {}
        for name in names:
            if name in self.layers:
                groups.setdefault(self.layers[name], []).append(name)
        return list(groups.values())


def write_statistics(
    path: str | Path, stages: Sequence[tuple[list[str], int]], full: bool, sums: Iterator[InputSums]
) -> None:
    """Write entries one after the other as they come, so that only one has to be in memory.

    Args:
        path: the file; nothing is left there if writing fails.
        stages: for every entry, the layers that share it and their in_features.
        full: whether entries have Hessians.
        sums: the entries, in the order of `stages`.

    Raises:
        ValueError: an entry does not have the announced shape.
        OSError: the file cannot be written.
    """
    path = Path(path)
    layers = {name: names[0] for names, _ in stages for name in names}
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "full": str(full), "layers": json.dumps(layers)}}
    offset = 0
    for names, k in stages:
        shapes = {"tokens": (torch.int64, []), "squares": (torch.float32, [k])}
        shapes |= {"hessian": (torch.float32, [k, k])} if full else {}
        for part, (dtype, shape) in shapes.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            offsets = [offset, offset + size]
            header[f"{names[0]}.{part}"] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": offsets}
            offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for (names, k), entry in zip(stages, sums, strict=True):
                if entry.squares.shape != (k,) or (entry.hessian is not None) != full:
                    raise ValueError(f"the statistics of {names[0]} do not have {k} inputs or lack their Hessian")
                for part in (entry.tokens, entry.squares, *([entry.hessian] if full else [])):
                    file.write(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def merge_statistics(paths: Iterable[str | Path], out: str | Path) -> None:
    """Add up statistics files of the same model, made from different data.

    Args:
        paths: files written by `collect_statistics`.
        out: the file to write; equals, within fp32 rounding, one made from all data at once.

    Raises:
        ValueError: no file, a damaged one, or files of different layers.
        FileNotFoundError: a file is missing.
        OSError: `out` cannot be written.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError(f"paths must be a list of files, got one: {str(paths)!r}; wrap it in a list")
    files = [StatisticsFile(path) for path in paths]
    if not files:
        raise ValueError("no statistics files are given to merge")
    first = files[0]
    for other in files[1:]:
        if other.layers != first.layers or other.full != first.full:
            raise ValueError(f"{first.path} and {other.path} are not of the same layers and kind of statistics")
    stages = [(names, len(first.sums(names[0]).squares)) for names in first.stages(first.layers)]
    write_statistics(out, stages, first.full, (_added([file.sums(names[0]) for file in files]) for names, _ in stages))


def _added(parts: Sequence[InputSums]) -> InputSums:
    hessian = None if parts[0].hessian is None else sum(part.hessian for part in parts)
    return InputSums(sum(part.squares for part in parts), sum(part.tokens for part in parts), hessian)
