"""Hidden states of all calibration batches between two blocks, kept away from the accelerator."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@contextmanager
def hidden_directory(parent: str | Path | None) -> Iterator[Path | None]:
    """A directory of its own under `parent`, removed at the end; None for main memory."""
    if parent is None:
        yield None
        return
    Path(parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aaac-hidden-", dir=parent) as directory:
        yield Path(directory)


class StateCache:
    """A list of tensors, one per batch, in main memory or in files; they come back on the device they came from.

    Args:
        directory: an existing directory for the files, or None for main memory.
        name: what the files are called, where several caches share a directory.
    """

    def __init__(self, directory: Path | None = None, name: str = "hidden") -> None:
        self.directory, self.name = directory, name
        self._held: list[torch.Tensor | None] = []
        self._devices: list[torch.device] = []

    def __len__(self) -> int:
        return len(self._devices)

    def append(self, states: torch.Tensor) -> None:
        """Add the states of the next batch."""
        self._devices.append(states.device)
        self._held.append(None)
        self[len(self) - 1] = states

    def __getitem__(self, batch: int) -> torch.Tensor:
        if batch >= len(self):
            raise IndexError(batch)
        held = self._held[batch] if self.directory is None else load_file(self._path(batch))["states"]
        return held.to(self._devices[batch])

    def __setitem__(self, batch: int, states: torch.Tensor) -> None:
        states = states.detach()
        if self.directory is None:
            self._held[batch] = states if states.device.type == "cpu" else states.cpu()
        else:
            written = self.directory / "written.safetensors"
            save_file({"states": states.contiguous()}, written)
            os.replace(written, self._path(batch))  # `states` may be a view of the file that stands there

    def copy(self, name: str) -> StateCache:
        """A cache of its own with the same states."""
        other = StateCache(self.directory, name)
        for states in self:
            other.append(states)
        return other

    def _path(self, batch: int) -> Path:
        return self.directory / f"{self.name}-{batch}.safetensors"
