"""The output directory of a run over a model on disk: one shard per block, each the record that its block is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from aaac_ao.checkpoint import ModelOnDisk
from aaac_ao.resume import RunFolder, write_safely
from aaac_ao.tensor import AAACTensor

#: Subdirectory with what is needed to go on; its presence marks a directory as unfinished.
UNFINISHED = ".unfinished"


class OutputFolder(RunFolder):
    """A checkpoint that grows block by block. Without index and config until `finish`, it cannot be loaded before.

    Args:
        directory: is made if it does not exist; may hold an unfinished run of the same fingerprint and nothing else.
        run: see `RunFolder`.
        disk: the model that is worked on.
        blocks: its blocks.

    Raises:
        ValueError: the directory holds something else, or another run.
        OSError: it cannot be written.
    """

    def __init__(
        self, directory: str | Path, run: Mapping[str, Any], disk: ModelOnDisk, blocks: list[nn.Module]
    ) -> None:
        self.out, self.disk, self.blocks = Path(directory), disk, blocks
        check_output(self.out)
        super().__init__(self.out / UNFINISHED, run)

    def save(self, index: int, scales: list[torch.Tensor | None], weights: Mapping[str, torch.Tensor]) -> None:
        """Write the shard of a finished block, then the note that it is complete.

        Raises:
            OSError: it cannot be written.
        """
        self._write_shard(index, self.disk.state_of(self.blocks[index]))
        super().save(index, scales, {})

    def load(self, index: int) -> tuple[list[torch.Tensor | None], dict[str, AAACTensor]] | None:
        """The AWQ scales and weights of a finished block, or None.

        Raises:
            ValueError: its files are damaged.
        """
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        finished = super().load(index)
        if finished is None:
            return None
        path = self._shard(index)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                state, _ = unflatten_tensor_state_dict(tensors, file.metadata())
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete {self.out} and run again") from None
        weights = {name: tensor for name, tensor in state.items() if isinstance(tensor, AAACTensor)}
        return finished[0], {name.removesuffix(".weight"): weight for name, weight in weights.items()}

    def finish(self) -> None:
        """Write everything outside the blocks and the index; what follows makes the checkpoint loadable.

        Raises:
            OSError: a file cannot be written.
        """
        last, described = len(self.blocks), {}
        for index in range(last):
            with safe_open(self._shard(index), "pt") as file:
                described.update(file.metadata())
        # loaders that merge the metadata of all files keep the list of names of the last one
        self._write_shard(last, self.disk.stored_outside(self.blocks), described)
        weight_map, size = {}, 0
        for path in (self._shard(index) for index in range(last + 1)):
            with safe_open(path, "pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), path.name))
            size += path.stat().st_size
        index = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        path = self.out / "model.safetensors.index.json"
        write_safely(path, lambda temporary: temporary.write_text(index + "\n", encoding="utf-8"))

    def close(self) -> None:
        """Drop the notes of the run if it was finished, or if no block is."""
        if (self.out / "config.json").exists() or not any(self.directory.iterdir()):
            shutil.rmtree(self.directory)
            for path in self.out.glob("*.part"):
                path.unlink()

    def _write_shard(
        self, index: int, state: Mapping[str, torch.Tensor], described: Mapping[str, str] | None = None
    ) -> None:
        """Write tensors as transformers does, with the metadata of other shards if given."""
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        tensors, metadata = flatten_tensor_state_dict(dict(state))
        if described is not None:
            names = [name for name in described if name not in ("tensor_names", "format")] + list(state)
            metadata = {**described, **metadata, "tensor_names": json.dumps(names)}
        metadata["format"] = "pt"
        write_safely(self._shard(index), lambda temporary: save_file(tensors, temporary, metadata))

    def _shard(self, index: int) -> Path:
        return self.out / f"model-{index + 1:05d}-of-{len(self.blocks) + 1:05d}.safetensors"


def check_output(directory: Path) -> None:
    """Refuse a directory that holds anything but an unfinished run.

    Raises:
        ValueError: it is a file, or it is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if directory.is_dir() and (directory / UNFINISHED).is_dir():
            return
        raise ValueError(f"{directory} exists and is neither empty nor an unfinished run; choose another directory")
