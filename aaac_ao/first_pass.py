"""The first pass over the data: the calls of the blocks, which layers share an input, and who got a bad one or none.

It runs the original model and changes nothing, so that bad data is refused before any work is done.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from aaac_ao.blocks import CallRecord, Stop, find_blocks, hooks, input_of
from aaac_ao.evaluate import evaluation_mode
from aaac_ao.hidden import StateCache
from aaac_ao.moments import in_chunks
from aaac_ao.transform import raise_problems

logger = logging.getLogger(__name__)

Batch = torch.Tensor | Mapping[str, Any]


class LayerRecord:
    """Forward pre-hooks that look at the inputs of layers and keep none of them.

    Attributes:
        stages: names of layers in the order of their first call; consecutive layers that read the same tensor, as q, k
            and v do, form one stage.
        repeated: names of layers that are called more than once for a batch.
        tokens: how many input vectors each layer saw.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.names = {module: name for name, module in layers.items()}
        self.stages: list[list[str]] = []
        self.repeated: set[str] = set()
        self.tokens: dict[str, int] = dict.fromkeys(layers, 0)
        self._seen: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in layers}  # batch, sum of squares
        self._last: tuple[weakref.ref[torch.Tensor], int, str] | None = None
        self._batch = -1

    def handles(self) -> list:
        """Register the hooks."""
        return [module.register_forward_pre_hook(self.before, with_kwargs=True) for module in self.names]

    def start_batch(self, batch: int) -> None:
        """Begin with a batch of this number."""
        self._batch, self._last, self._called = batch, None, set()

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Look at one input."""
        name, x = self.names[module], input_of(args, kwargs)
        if name in self._called:
            self.repeated.add(name)
        self._called.add(name)
        if not self._seen[name]:
            same = self._last is not None and x is self._last[0]() and x._version == self._last[1]
            if same and self._last[2] in self.stages[-1]:
                self.stages[-1].append(name)
            else:
                self.stages.append([name])
        self._last = (weakref.ref(x), x._version, name)
        self.tokens[name] += x.numel() // x.shape[-1]
        parts = in_chunks(x.detach().reshape(-1, x.shape[-1]))
        squares = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]).square().sum()
        self._seen[name].append((self._batch, squares))

    def unreached(self) -> list[str]:
        """Names of layers that saw no input vector."""
        return [name for name, tokens in self.tokens.items() if tokens == 0]

    def problems(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Those of the layers, by default all, whose second moments leave fp32, and the first batch to blame."""
        problems = {}
        for name in self._seen if names is None else names:
            total = 0.0
            for batch, squares in self._seen[name]:
                total = total + squares
                if not bool(torch.isfinite(squares)):
                    problems[name] = f"calibration batch {batch} gives it NaN, infinite or huge inputs"
                    break
                if not bool(torch.isfinite(total)):
                    problems[name] = f"the squares of its inputs leave the range of fp32 by calibration batch {batch}"
                    break
        return problems

    def stages_of(self, names: set[str]) -> list[list[str]]:
        """The stages, cut down to some layers."""
        cut = [[name for name in stage if name in names] for stage in self.stages]
        return [stage for stage in cut if stage]


# the data


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list.

    Raises:
        TypeError: a batch that is neither a tensor nor a mapping, or no list of them.
        ValueError: no batch, or an empty one.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str)):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}; wrap it in a list")
    checked = list(batches)
    if not checked:
        raise ValueError("batches is empty: give at least one batch of token ids")
    for index, batch in enumerate(checked):
        if not isinstance(batch, (torch.Tensor, Mapping)):
            message = f"batch {index} must be token ids (a tensor) or a mapping of keyword arguments"
            raise TypeError(f"{message}, got {type(batch).__name__}")
        if isinstance(batch, torch.Tensor) and batch.numel() == 0:
            raise ValueError(f"batch {index} is empty: its shape is {list(batch.shape)}")
        if isinstance(batch, Mapping) and not batch:
            raise ValueError(f"batch {index} is an empty mapping")
    return checked


# running the model


def call_model(model: nn.Module, batch: Batch, device: torch.device | None = None) -> Any:
    """The model's output for one batch; `device` is by default that of its first parameter."""
    device = next(model.parameters()).device if device is None else device
    if isinstance(batch, torch.Tensor):
        return model(batch.to(device))
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return model(**moved | ({"use_cache": False} if "use_cache" in moved else {}))


def run_batch(model: nn.Module, batch: Batch, device: torch.device | None = None) -> None:
    """Run a model on one batch, until a hook raises `Stop`."""
    with suppress(Stop):
        call_model(model, batch, device)


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The layer that gives the logits, if the model names one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [] if head is None else [head]


@contextmanager
def ready_to_run(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Evaluation mode, without gradients, key-value caches, and logits unless their layer is among `layers`."""

    def stop(module, args):
        raise Stop

    skipped = [head for head in output_heads(model) if head not in layers.values()]
    with ExitStack() as stack:
        for context in (evaluation_mode(model), without_caches(model), torch.no_grad()):
            stack.enter_context(context)
        stack.enter_context(hooks(module.register_forward_pre_hook(stop) for module in skipped))
        yield


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """No key-value caches, in any part of the model; undone at the end."""
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(c): (c, c.use_cache) for c in found if getattr(c, "use_cache", None) is not None}
    for config, _ in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config, use_cache in configs.values():
            config.use_cache = use_cache


def layers_outside(layers: dict[str, nn.Module], blocks: list[nn.Module]) -> dict[str, nn.Module]:
    """Those of the layers that are in none of the blocks."""
    inside = {module for block in blocks for module in block.modules()}
    return {name: module for name, module in layers.items() if module not in inside}


def first_pass(
    model: nn.Module, batches: list[Batch], layers: dict[str, nn.Module], hidden: StateCache
) -> tuple[CallRecord, LayerRecord]:
    """Run all batches through the original model; record the calls of its blocks and what its layers see.

    Raises:
        ValueError: a layer whose inputs are not finite.
    """
    record, observed = CallRecord(find_blocks(model), hidden), LayerRecord(layers)
    blocks_only = not layers_outside(layers, record.blocks)

    def stop(module, args, output):
        if blocks_only and record.broken is None and len(record.calls) > 1:
            raise Stop  # the first batch shows whether anything follows the blocks

    last = [block.register_forward_hook(stop) for block in record.blocks[-1:]]
    with hooks([*observed.handles(), *record.handles(), *last]):
        for index, batch in enumerate(batches):
            record.start_batch()
            observed.start_batch(index)
            run_batch(model, batch)
            record.end_batch()
    raise_problems(observed.problems())
    return record, observed


def report_coverage(observed: LayerRecord, layers: dict[str, nn.Module], strict: bool) -> None:
    """Warn of layers that saw nothing, or fewer tokens than they have inputs."""
    unreached = observed.unreached()
    if unreached and (strict or len(unreached) == len(layers)):
        raise_problems(dict.fromkeys(unreached, "no calibration batch reaches it; leave it out with filter_fn"))
    if unreached:
        logger.warning("no calibration batch reaches %s: left in high precision", ", ".join(unreached))
    few = {name: n for name, n in observed.tokens.items() if 0 < n < layers[name].in_features}
    if few:
        name, tokens = min(few.items(), key=lambda item: item[1] / layers[item[0]].in_features)
        logger.warning(
            "%d layer(s) see fewer calibration tokens than they have inputs, %s the fewest: %d tokens for %d inputs; "
            "give more batches",
            *(len(few), name, tokens, layers[name].in_features),
        )
