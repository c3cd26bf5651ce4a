"""Models larger than memory: a model without values, and the checkpoint from which parts of it come and go."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from aaac_ao.heap import hand_back_memory

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class SourceCheckpoint:
    """The tensors in the safetensors files of a local checkpoint, one file or shards with an index.

    Tensors are views of the mapped files, so that only what is looked at takes memory, until the last of them is gone.

    Args:
        directory: where `model.safetensors` or `model.safetensors.index.json` lies.

    Attributes:
        files: tensor name -> the file that holds it.

    Raises:
        FileNotFoundError: there is no such directory, or no safetensors file in it.
        ValueError: a file is missing, truncated, damaged or does not hold what the index says.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} is not a local directory with a model; download the model first")
        self.files: dict[str, Path] = {}
        for path, expected in self._shards().items():
            with _opened(path) as file:
                names = set(file.keys())
            if expected - names:
                raise ValueError(f"{path} lacks {_some(expected - names)}, which {_INDEX} says it holds")
            if twice := names & self.files.keys():
                raise ValueError(f"{path} and another file both hold {_some(twice)}")
            self.files.update(dict.fromkeys(names, path))

    def _shards(self) -> dict[Path, set[str]]:
        """The files, and what the index says they hold."""
        index, single = self.directory / _INDEX, self.directory / _SINGLE
        if not index.exists():
            if not single.exists():
                raise FileNotFoundError(f"{self.directory} has neither {_SINGLE} nor {_INDEX}")
            return {single: set()}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards: dict[Path, set[str]] = {}
            for name, file in weight_map.items():
                shards.setdefault(self.directory / file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: {error!r}") from None
        missing = [path.name for path in shards if not path.is_file()]
        if missing:
            raise ValueError(f"{self.directory} lacks files that {_INDEX} names: {_some(missing)}")
        return shards

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors on the CPU, file by file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, members in by_file.items():
            with _opened(path) as file:
                for name in members:
                    yield name, file.get_tensor(name)

    def rows(self, name: str) -> list[torch.Tensor]:
        """The first and the last row of a tensor."""
        with _opened(self.files[name]) as file:
            part = file.get_slice(name)
            return [part[:1], part[part.get_shape()[0] - 1 :]]

    def describe(self) -> dict[str, tuple[list[int], torch.dtype | None]]:
        """Shape and dtype of every tensor; no dtype for those that torch's floating-point types do not include."""
        found = {}
        for path in dict.fromkeys(self.files.values()):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  (no dict)
                    part = file.get_slice(name)
                    found[name] = (part.get_shape(), _FLOATS.get(part.get_dtype()))
        return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file: {error}") from None


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class ModelOnDisk:
    """A transformers model on the meta device whose parts are loaded from a checkpoint when they are needed.

    Args:
        model: without values, see `aaac_ao.integrations.transformers.empty_model`.
        source: its checkpoint.
        device: where loaded parts go.

    Raises:
        ValueError: names or shapes of the checkpoint do not fit the model.
    """

    def __init__(self, model: nn.Module, source: SourceCheckpoint, device: torch.device | str = "cpu") -> None:
        self.model, self.source, self.device = model, source, torch.device(device)
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        state = model.state_dict(keep_vars=True)
        groups: dict[int, list[str]] = {}
        for name, tensor in state.items():
            groups.setdefault(id(tensor), []).append(name)
        #: name in the source -> all names of that tensor in the model; several where it is tied
        self._tied: dict[str, list[str]] = {}
        self._check_names(list(groups.values()), state)

    def _check_names(self, groups: list[list[str]], state: Mapping[str, torch.Tensor]) -> None:
        described, missing, wrong = self.source.describe(), [], []
        known = {name for names in groups for name in names}
        for names in groups:
            stored = [name for name in names if name in described]
            if not stored:
                missing.append(names[0])
                continue
            shape = list(state[names[0]].shape)
            wrong += [f"{n} {described[n][0]} instead of {shape}" for n in stored if described[n][0] != shape]
            self._tied[stored[0]] = names
            for other in stored[1:]:
                if not all(torch.equal(a, b) for a, b in self._in_pieces(stored[0], other)):
                    raise ValueError(f"{stored[0]} and {other} should be tied, but {self.source.directory} differs")
        ignored = [*(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$"]
        surplus = [n for n in described if n not in known and not any(re.search(p, n) for p in ignored)]
        problems = {"missing": missing, "left over": surplus, "of another shape": wrong}
        if any(problems.values()):
            found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
            raise ValueError(f"{self.source.directory} does not fit {type(self.model).__name__} ({found})")

    def _in_pieces(self, *names: str) -> Iterator[tuple[torch.Tensor, ...]]:
        tensors = [tensor for name in names for _, tensor in self.source.read([name])]
        yield from zip(*(tensor.split(1024) for tensor in tensors), strict=True)

    def stored_name(self, name: str) -> str:
        """The name under which the source holds a tensor of the model."""
        return next(stored for stored, names in self._tied.items() if name in names)

    def outside(self, parts: Iterable[nn.Module]) -> set[str]:
        """Stored names of all tensors that have a name outside the parts."""
        prefixes = tuple(self._names[part] + "." for part in parts)
        return {stored for stored, names in self._tied.items() if not all(name.startswith(prefixes) for name in names)}

    def load(self, stored_names: Iterable[str], copy: bool = False) -> None:
        """Give values to tensors of the model; tied ones stay tied.

        A copy is gone with its tensor; what is mapped stays in memory until the last tensor of the file is gone.
        """
        # a file that is opened for every tensor never has more than one of them in memory besides its copy
        parts = [[name] for name in stored_names] if copy else [stored_names]
        for stored, tensor in itertools.chain.from_iterable(map(self.source.read, parts)):
            slots = [(self._modules[prefix], leaf) for prefix, _, leaf in map(_split, self._tied[stored])]
            module, leaf = slots[0]
            tensor = tensor.to(self.device, getattr(module, leaf).dtype, copy=copy)
            value = nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor
            for module, leaf in slots:
                (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value

    @contextmanager
    def loaded(self, part: nn.Module) -> Iterator[None]:
        """Give values to a part of the model, and take whatever is there by then away again at the end."""
        try:
            self.load(self._tied.keys() - self.outside([part]), copy=True)
            yield
        finally:
            _empty(part.modules())
            hand_back_memory()

    @contextmanager
    def loaded_outside(self, parts: Iterable[nn.Module]) -> Iterator[None]:
        """The same for everything that has a name outside the parts; buffers stay."""
        try:
            self.load(self.outside(parts))
            yield
        finally:
            _empty(self.model.modules())
            hand_back_memory()

    def state_of(self, part: nn.Module) -> dict[str, torch.Tensor]:
        """The present tensors of a part on the CPU, under their full names."""
        prefix = self._names[part]
        return {f"{prefix}.{n}": tensor.detach().cpu().contiguous() for n, tensor in part.state_dict().items()}

    def stored_outside(self, parts: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
        """All tensors outside the parts as the source has them, in the dtype and under the names to be saved."""
        found, tied = {}, getattr(self.model, "_tied_weights_keys", None) or []
        for stored, tensor in self.source.read(sorted(self.outside(parts))):
            names = self._tied[stored]
            first = [name for name in names if not any(re.search(pattern, name) for pattern in tied)]
            prefix, _, leaf = _split(names[0])
            found[(first or names)[0]] = tensor.to(getattr(self._modules[prefix], leaf).dtype).contiguous()
        return found


def _empty(modules: Iterable[nn.Module]) -> None:
    """Put parameters back on the meta device."""
    for module in modules:
        for leaf, value in module._parameters.items():
            if value is not None and not value.is_meta:
                module._parameters[leaf] = nn.Parameter(value.detach().to("meta"), requires_grad=False)


def _split(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")
