"""A folder that keeps the finished blocks of a calibration run, so that an interrupted run goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from aaac_ao.tensor import AAACTensor

_PARTS = ("qdata", "scale", "codebooks", "per_tensor_scale")


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the bytes, dtypes and shapes of tensors."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def fingerprint(
    names: Iterable[str],
    rows: Iterable[torch.Tensor],
    batches: Iterable[Any],
    settings: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """What two runs must have in common to share a folder.

    Args:
        names: of the layers.
        rows: the first and the last row of every weight stand for all of it.
        batches: the data.
        settings: JSON-safe values.
        device: where the layers are encoded.
    """
    given: list[torch.Tensor] = []
    for batch in batches:
        items = batch.items() if isinstance(batch, Mapping) else [("", batch)]
        given += [value for _, value in sorted(items) if isinstance(value, torch.Tensor)]
    model = {"layers": list(names), "weights": digest(rows)}
    return {**settings, **model, "batches": digest(given), "device": device.type, "torch": torch.__version__}


class RunFolder:
    """Finished blocks in safetensors files, and the fingerprint of the run they belong to.

    Args:
        directory: is made if it does not exist.
        run: JSON-safe fingerprint, see `fingerprint`.

    Raises:
        ValueError: the directory belongs to another run; the message names what differs.
        OSError: it cannot be written.
    """

    def __init__(self, directory: str | Path, run: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._run = json.loads(json.dumps(dict(run)))
        path = self.directory / "run.json"
        if not path.exists():
            return  # it is written with the first block: a run that fails before leaves nothing behind
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(key for key in known.keys() | self._run.keys() if known.get(key) != self._run.get(key))
        except (ValueError, AttributeError):
            raise ValueError(f"{path} is no record of a run; delete it or choose another directory") from None
        if differing:
            raise ValueError(
                f"{self.directory} holds a run that differs in {', '.join(differing)}; start from the original "
                "model, data and settings, or choose another directory"
            )

    def save(self, index: int, scales: list[torch.Tensor | None], weights: Mapping[str, torch.Tensor]) -> None:
        """Keep a finished block: the AWQ scales of its pairs and its quantised weights, by layer name.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        tensors = {f"awq.{i}": scale for i, scale in enumerate(scales) if scale is not None}
        layers = {}
        for name, weight in weights.items():
            if not isinstance(weight, AAACTensor):
                continue
            weight = weight.data if isinstance(weight, nn.Parameter) else weight
            parts = {part: getattr(weight, part) for part in _PARTS}
            tensors |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
            layers[name] = {"group_size": weight.group_size, "k_pad": weight.k_pad, "dtype": str(weight.dtype)[6:]}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"layers": json.dumps(layers), "pairs": str(len(scales))}
        record = self.directory / "run.json"
        if not record.exists():
            text = json.dumps(self._run, indent=1)
            write_safely(record, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        write_safely(self._path(index), lambda temporary: save_file(tensors, temporary, metadata))

    def load(self, index: int) -> tuple[list[torch.Tensor | None], dict[str, AAACTensor]] | None:
        """The AWQ scales and weights of a finished block, or None.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata, present = file.metadata(), set(file.keys())
                get = lambda name: file.get_tensor(name) if name in present else None  # noqa: E731
                scales = [get(f"awq.{i}") for i in range(int(metadata["pairs"]))]
                weights = {}
                for name, fields in json.loads(metadata["layers"]).items():
                    qdata, scale, codebooks, per_tensor_scale = (get(f"{name}.{part}") for part in _PARTS)
                    size, pad, dtype = fields["group_size"], fields["k_pad"], getattr(torch, fields["dtype"])
                    weights[name] = AAACTensor(qdata, scale, size, pad, dtype, codebooks, per_tensor_scale)
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from None
        return scales, weights

    def _path(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}.safetensors"


def write_safely(path: Path, write: Callable[[Path], Any]) -> None:
    """Write through a temporary file, so that a name never stands for half a file.

    Args:
        path: the file.
        write: is called with the path of the temporary file.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {error}; finished blocks are kept, so free some space and run again"
        ) from None
