"""`calibrate_`: quantise a model with data in one call, one decoder block after the other.

A first pass over the data runs the original model once, to refuse bad data before anything changes and to keep the
inputs of the first block. Then every block is observed, quantised and left: only its own statistics are alive, and the
inputs of the next block are its original outputs. A model whose blocks do not form a plain chain is observed as a
whole. Kept meanwhile, on the device of the model: the hidden states of all batches between two blocks.
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

from aaac_ao.blocks import CallRecord, find_blocks, hidden_states_of
from aaac_ao.config import AAACConfig
from aaac_ao.evaluate import evaluation_mode
from aaac_ao.observer import ObserverTensor
from aaac_ao.transform import apply_step, is_left_alone, problem_with, raise_problems

logger = logging.getLogger(__name__)

Batch = torch.Tensor | Mapping[str, Any]
FilterFn = Callable[[nn.Module, str], bool]


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
    layers = selected_layers(model, filter_fn)
    if not layers:
        raise ValueError("no nn.Linear is selected: check filter_fn")
    prepare = dataclasses.replace(config, step="prepare")
    _refuse_problems(layers, prepare)
    layers = {name: module for name, module in layers.items() if not is_left_alone(module.weight, prepare)}
    if not layers:
        logger.warning("every selected layer is quantised already or smaller than group_size %d", config.group_size)
        return model
    with evaluation_mode(model), _without_caches(model), torch.no_grad():
        record = _first_pass(model, batches, layers)
        blocks = [] if record.broken else record.blocks
        if record.blocks and record.broken:
            logger.info("observing the model as a whole, because %s", record.broken)
        inside = {id(module) for block in blocks for module in block.modules()}
        outside = {name: module for name, module in layers.items() if id(module) not in inside}
        _quantise_together(model, outside, config, batches)
        _quantise_blocks(record, blocks, layers, config, progress)
    return model


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
        if isinstance(batch, Mapping) and not batch:
            raise ValueError(f"batch {index} is an empty mapping")
    return checked


def selected_layers(model: nn.Module, filter_fn: FilterFn | None = None) -> dict[str, nn.Module]:
    """The linear layers, by name, that `filter_fn` selects; by default all but the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if filter_fn is None:
        filter_fn = lambda module, name: module is not head  # noqa: E731
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and filter_fn(m, n)}


def _refuse_problems(layers: dict[str, nn.Module], config: AAACConfig) -> None:
    raise_problems({name: p for name, m in layers.items() if (p := problem_with(m.weight, config)) is not None})


# running the model


class _Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Leaves a forward pass after the last block: the output head is not needed."""


def _run(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device
    try:
        if isinstance(batch, torch.Tensor):
            model(batch.to(device))
        else:
            moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            model(**moved | ({"use_cache": False} if "use_cache" in moved else {}))
    except _Stop:
        pass


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
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


@contextmanager
def _hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_pass(model: nn.Module, batches: list[Batch], layers: dict[str, nn.Module]) -> CallRecord:
    """Run all batches through the original model and record the calls of its blocks.

    Raises:
        ValueError: a layer that no batch reaches, or whose inputs are not finite.
    """
    record = CallRecord(find_blocks(model))
    inside = {id(module) for block in record.blocks for module in block.modules()}
    blocks_only = all(id(module) in inside for module in layers.values())
    sound: dict[int, torch.Tensor] = {}

    def check(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        finite = torch.isfinite(torch.linalg.vector_norm(x, dtype=torch.float32).square())
        sound[id(module)] = finite & sound.get(id(module), finite)

    def stop(module, args, output):
        if blocks_only and record.broken is None and len(record.calls) > 1:
            raise _Stop  # the first batch shows whether anything follows the blocks

    handles = [module.register_forward_pre_hook(check, with_kwargs=True) for module in layers.values()]
    for block in record.blocks:
        handles += [
            block.register_forward_pre_hook(record.before, with_kwargs=True),
            block.register_forward_hook(record.after),
        ]
    handles += [block.register_forward_hook(stop) for block in record.blocks[-1:]]
    with _hooks(handles):
        for batch in batches:
            record.start_batch()
            _run(model, batch)
            record.end_batch()
    unreached = "no calibration batch reaches it; leave it out with filter_fn"
    problems = {name: unreached for name, module in layers.items() if id(module) not in sound}
    for name, module in layers.items():
        if name not in problems and not bool(sound[id(module)]):
            problems[name] = "the calibration batches give it NaN or infinite inputs"
    raise_problems(problems)
    return record


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
    record: CallRecord, blocks: list[nn.Module], layers: dict[str, nn.Module], config: AAACConfig, progress: bool
) -> None:
    names = {id(module): name for name, module in layers.items()}
    for index, block in enumerate(tqdm(blocks, desc="quantising blocks", disable=not progress)):
        own = {names[id(module)]: module for module in block.modules() if id(module) in names}
        with _observing(own, config):
            for batch, states in enumerate(record.hidden):
                args, kwargs = record.calls[batch][index]
                record.hidden[batch] = hidden_states_of(block(states, *args, **kwargs))
                record.calls[batch][index] = ((), {})


@contextmanager
def _observing(layers: dict[str, nn.Module], config: AAACConfig) -> Iterator[None]:
    """Observe the inputs of layers while the context runs, then quantise them; restore them if it fails."""
    prepare, convert = (dataclasses.replace(config, step=step) for step in ("prepare", "convert"))
    originals = {name: module.weight for name, module in layers.items()}
    try:
        for module in layers.values():
            apply_step(module, prepare)
        yield
        _refuse_problems(layers, convert)
        for module in layers.values():
            apply_step(module, convert)
    except BaseException:
        for name, module in layers.items():
            if isinstance(module.weight, ObserverTensor):
                module.weight = originals[name]
        raise
