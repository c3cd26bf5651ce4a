"""`calibrate_`: quantise a model with data in one call, one decoder block after the other.

A first pass over the data runs the original model once, to refuse bad data before anything changes and to keep the
inputs of the first block. Then every block is observed, quantised and left: only its own statistics are alive, and the
inputs of the next block are its original outputs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from aaac_ao.config import AAACConfig
from aaac_ao.observer import ObserverTensor
from aaac_ao.tensor import AAACTensor
from aaac_ao.transform import apply_step, problem_with, raise_problems

logger = logging.getLogger(__name__)

Batch = torch.Tensor | Mapping[str, Any]
FilterFn = Callable[[nn.Module, str], bool]
#: The call of a block: positional arguments after the hidden states, and keyword arguments.
Call = tuple[tuple, dict[str, Any]]


def calibrate_(
    model: nn.Module,
    config: AAACConfig,
    batches: Iterable[Batch],
    filter_fn: FilterFn | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantise the linear layers of `model` in place, weighted by what they see in `batches`.

    Transformers models are worked on block by block; a model without a list of decoder blocks is observed as a whole.
    When a run is stopped, the blocks that are done stay quantised and a second call goes on with the others.

    Args:
        model: the model; its training mode is kept.
        config: the settings; `step` is ignored.
        batches: token ids [batch, tokens], or dicts of keyword arguments of the model.
        filter_fn: (module, qualified name) -> whether to quantise; default: every nn.Linear except the output head.
        progress: show a progress bar.

    Returns:
        The same model.

    Raises:
        TypeError: a batch that is neither a tensor nor a mapping.
        ValueError: no batches; no layer selected; weights or activations that are NaN or infinite; a selected layer
            that no batch reaches. Nothing was changed then.
    """
    batches = _checked_batches(batches)
    layers = _selected_layers(model, filter_fn)
    prepare = dataclasses.replace(config, step="prepare")
    raise_problems({name: p for name, m in layers.items() if (p := problem_with(m.weight, prepare)) is not None})
    layers = {name: m for name, m in layers.items() if _would_quantise(m, config)}
    if not layers:
        logger.warning("every selected layer is quantised already or smaller than group_size %d", config.group_size)
        return model
    blocks = find_blocks(model)
    with _evaluation_mode(model), torch.no_grad():
        inside = {id(module) for block in blocks for module in block.modules()}
        outside = {name: module for name, module in layers.items() if id(module) not in inside}
        hidden, calls = _first_pass(model, blocks, batches, layers, to_the_end=bool(outside))
        _quantise_together(model, outside, config, batches)
        _quantise_blocks(blocks, layers, config, hidden, calls, progress)
    return model


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks: the nn.ModuleList with the most linear weights among those whose members share a class."""
    best, best_size = [], 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or len({type(m) for m in module}) != 1:
            continue
        size = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        if size > best_size and not isinstance(module[0], nn.Linear):
            best, best_size = list(module), size
    return best


# what to quantise


def _checked_batches(batches: Iterable[Batch]) -> list[Batch]:
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
    return checked


def _selected_layers(model: nn.Module, filter_fn: FilterFn | None) -> dict[str, nn.Module]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if filter_fn is None:
        filter_fn = lambda module, name: module is not head  # noqa: E731
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and filter_fn(m, n)}
    if not layers:
        raise ValueError("no nn.Linear is selected: check filter_fn")
    return layers


def _would_quantise(module: nn.Module, config: AAACConfig) -> bool:
    return not isinstance(module.weight, AAACTensor) and module.weight.shape[1] >= config.group_size


# running the model


class _Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Leaves a forward pass after the last block: the output head is not needed."""


def _run(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device
    try:
        if isinstance(batch, torch.Tensor):
            model(batch.to(device))
        else:
            model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
    except _Stop:
        pass


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a key-value cache, undone at the end."""
    training, cache = model.training, getattr(getattr(model, "config", None), "use_cache", None)
    model.eval()
    if cache is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        if cache is not None:
            model.config.use_cache = cache


@contextmanager
def _hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_pass(
    model: nn.Module,
    blocks: list[nn.Module],
    batches: list[Batch],
    layers: dict[str, nn.Module],
    to_the_end: bool,
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """Run all batches through the original model, `to_the_end` or just through its blocks.

    Returns:
        The inputs of the first block per batch, and per batch the other arguments of every block.

    Raises:
        ValueError: a layer that no batch reaches, or hidden states that are not finite.
    """
    hidden: list[torch.Tensor] = []
    calls: list[list[Call]] = []
    reached: set[int] = set()

    def remember(module, args, kwargs):
        args, kwargs = list(args), dict(kwargs)
        states = args.pop(0) if args else kwargs.pop("hidden_states")
        if module is blocks[0]:
            hidden.append(states)
            calls.append([])
        calls[-1].append((tuple(args), kwargs))

    def check(module, args, output):
        if not bool(torch.isfinite(_hidden_states(output)).all()):
            raise ValueError(f"batch {len(calls) - 1} gives NaN or infinite hidden states; nothing was changed")
        if not to_the_end:
            raise _Stop

    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    handles += [m.register_forward_pre_hook(lambda module, args: reached.add(id(module))) for m in layers.values()]
    if blocks:
        handles.append(blocks[-1].register_forward_hook(check))
    with _hooks(handles):
        for batch in batches:
            _run(model, batch)
    unreached = [name for name, module in layers.items() if id(module) not in reached]
    raise_problems(dict.fromkeys(unreached, "no calibration batch reaches it; leave it out with filter_fn"))
    return hidden, calls


def _hidden_states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


# quantising


def _quantise_together(
    model: nn.Module, layers: dict[str, nn.Module], config: AAACConfig, batches: list[Batch]
) -> None:
    """Observe and quantise layers outside the blocks with full passes."""
    if not layers:
        return
    with _observing(layers, config):
        for batch in batches:
            _run(model, batch)


def _quantise_blocks(
    blocks: list[nn.Module],
    layers: dict[str, nn.Module],
    config: AAACConfig,
    hidden: list[torch.Tensor],
    calls: list[list[Call]],
    progress: bool,
) -> None:
    names = {id(module): name for name, module in layers.items()}
    for index, block in enumerate(tqdm(blocks, desc="quantising blocks", disable=not progress)):
        own = {names[id(module)]: module for module in block.modules() if id(module) in names}
        with _observing(own, config):
            for number, states in enumerate(hidden):
                args, kwargs = calls[number][index]
                hidden[number] = _hidden_states(block(states, *args, **kwargs))
                calls[number][index] = ((), {})


@contextmanager
def _observing(layers: dict[str, nn.Module], config: AAACConfig) -> Iterator[None]:
    """Observe the inputs of layers while the context runs, then quantise them; restore them if it fails."""
    prepare, convert = (dataclasses.replace(config, step=step) for step in ("prepare", "convert"))
    originals = {name: module.weight for name, module in layers.items()}
    try:
        for module in layers.values():
            apply_step(module, prepare)
        yield
        raise_problems({name: p for name, m in layers.items() if (p := problem_with(m.weight, convert)) is not None})
        for module in layers.values():
            apply_step(module, convert)
    except BaseException:
        for name, module in layers.items():
            if isinstance(module.weight, ObserverTensor):
                module.weight = originals[name]
        raise
