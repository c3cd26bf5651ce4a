"""`calibrate_checkpoint`: `calibrate_` for models larger than memory, from one directory to another.

The model stands on the meta device. A first pass without the blocks notes what they will be called with; a second one
loads block after block and refuses bad weights and data before anything is written. Then `BlockPass` works on one block
at a time, which is loaded before, written as a shard and freed after. Index and config come last.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from aaac_ao.block_pass import BlockPass, Report
from aaac_ao.blocks import CallRecord, find_blocks, hidden_states_of, hooks
from aaac_ao.calibrate import FilterFn, reporting, selected_layers
from aaac_ao.checkpoint import ModelOnDisk, SourceCheckpoint
from aaac_ao.config import AAACConfig
from aaac_ao.first_pass import (
    Batch,
    LayerRecord,
    checked_batches,
    layers_outside,
    output_heads,
    ready_to_run,
    report_coverage,
    run_batch,
)
from aaac_ao.heap import hand_back_memory, map_large_tensors
from aaac_ao.hidden import StateCache, hidden_directory
from aaac_ao.options import Options
from aaac_ao.output import OutputFolder, check_output
from aaac_ao.resume import fingerprint
from aaac_ao.tensor import AAACTensor
from aaac_ao.transform import is_left_alone, problem_with, raise_problems, set_weight

logger = logging.getLogger(__name__)


def calibrate_checkpoint(
    source: str | Path,
    config: AAACConfig,
    batches: Iterable[Batch] | None,
    out: str | Path,
    filter_fn: FilterFn | None = None,
    progress: bool = True,
    *,
    propagate: str | None = None,
    awq: bool = False,
    share_codebooks: bool = False,
    cache_dir: str | Path | None = None,
    strict: bool = False,
    device: torch.device | str = "cpu",
    tokenizer: Any = None,
) -> nn.Module:
    """Quantise a local transformers checkpoint into another one, with no more than a block of it in memory.

    The result is the same, to the bit, as loading the model, `calibrate_` and `save_quantized`. The same call goes on
    where an earlier one was stopped: finished blocks are in `out` already. Until all is done, `out` has no config and
    cannot be taken for a model. On Linux, malloc is told, for the rest of the process, to hand large freed tensors back
    to the system.

    Args:
        source: directory of a causal language model in safetensors files.
        config: see `calibrate_`.
        batches: see `calibrate_`; None quantises without data.
        out: the directory to write: new, empty, or with an unfinished run of the same call.
        filter_fn: see `calibrate_`; only layers inside the decoder blocks can be quantised, the output head cannot.
        progress: show a progress bar.
        propagate: see `calibrate_`.
        awq: see `calibrate_`.
        share_codebooks: see `calibrate_`.
        cache_dir: keep hidden states in files under this directory instead of in main memory.
        strict: see `calibrate_`.
        device: where blocks are run and encoded.
        tokenizer: is written too if given.

    Returns:
        The quantised model without values, on the meta device: shapes and formats of what was written.

    Raises:
        FileNotFoundError: `source` is not a directory with safetensors files.
        TypeError, ValueError: as `calibrate_`; a checkpoint that is damaged or does not fit its model; blocks that form
            no plain chain; an `out` that is neither empty nor an unfinished run of the same call.
        OSError: `out` or `cache_dir` cannot be written to. Finished blocks stay.
    """
    options = Options.of(config, propagate, awq, share_codebooks)
    if batches is None and (propagate is not None or awq or share_codebooks):
        raise ValueError("propagate, awq and share_codebooks need data: give batches")
    batches = None if batches is None else checked_batches(batches)
    check_output(Path(out))
    map_large_tensors()
    disk = open_model(source, device)
    layers = _layers_to_quantise(disk.model, config, filter_fn)
    blocks = find_blocks(disk.model)
    if others := layers_outside(layers, blocks):
        raise ValueError(f"not in a decoder block: {', '.join(others)}; leave these out with filter_fn, or calibrate_")
    rows = (row for name in layers for row in disk.source.rows(disk.stored_name(f"{name}.weight")))
    run = fingerprint(layers, rows, batches or [], options.settings(), disk.device)
    folder = OutputFolder(out, run, disk, blocks)
    try:
        with reporting(len(layers), progress) as show:

            def report(name: str, error: float, count: int = 1) -> None:
                show(name, error, count)
                hand_back_memory()

            if batches is None:
                _without_data(disk, blocks, layers, config, report, folder)
            else:
                with hidden_directory(cache_dir) as directory, ready_to_run(disk.model, layers):
                    calls = partial(_calls, disk, blocks, batches, directory)
                    observed = _look(disk, calls(), layers, options, progress)
                    report_coverage(observed, layers, strict)
                    layers = {name: module for name, module in layers.items() if observed.tokens[name]}
                    # the look has moved the hidden states on; those before the first block are cheap to have again
                    block_pass = BlockPass(calls(), observed, layers, options, report, folder, restore=False)
                    for index, block in enumerate(blocks):
                        with disk.loaded(block):
                            block_pass.run(index, block)
        folder.finish()
        from aaac_ao.integrations.transformers import write_config

        write_config(disk.model, config, out, tokenizer)
    finally:
        folder.close()
    return disk.model


def open_model(source: str | Path, device: torch.device | str = "cpu") -> ModelOnDisk:
    """The model of a local checkpoint, without values.

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: a checkpoint that is damaged or does not fit its model.
    """
    from aaac_ao.integrations.transformers import empty_model

    files = SourceCheckpoint(source)
    floats = [dtype for _, dtype in files.describe().values() if dtype is not None]
    return ModelOnDisk(empty_model(source, floats[0] if floats else None), files, device)


def _layers_to_quantise(model: nn.Module, config: AAACConfig, filter_fn: FilterFn | None) -> dict[str, nn.Module]:
    prepare = dataclasses.replace(config, step="prepare")
    layers = selected_layers(model, filter_fn)
    layers = {name: module for name, module in layers.items() if not is_left_alone(module.weight, prepare)}
    if not layers:
        raise ValueError(f"no nn.Linear of at least group_size {config.group_size} inputs is selected")
    return layers


def _own(block: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    inside = set(block.modules())
    return {name: module for name, module in layers.items() if module in inside}


def _check_weights(own: dict[str, nn.Module], config: AAACConfig) -> None:
    raise_problems({name: p for name, m in own.items() if (p := problem_with(m.weight, config)) is not None})


def _without_data(
    disk: ModelOnDisk,
    blocks: list[nn.Module],
    layers: dict[str, nn.Module],
    config: AAACConfig,
    report: Report,
    folder: OutputFolder,
) -> None:
    config = dataclasses.replace(config, step=None)
    for index, block in enumerate(blocks):
        own = _own(block, layers)
        with disk.loaded(block):
            finished = folder.load(index)
            if finished is None:
                _check_weights(own, config)
            for name, module in own.items():
                weight = AAACTensor.from_hp(module.weight, config) if finished is None else finished[1][name]
                set_weight(module, weight)
                report(name, float("nan"), 1)
            if finished is None:
                folder.save(index, [], {})


def _calls(disk: ModelOnDisk, blocks: list[nn.Module], batches: list[Batch], directory: Path | None) -> CallRecord:
    """What all blocks are called with, found without running more than one of them.

    Raises:
        ValueError: the blocks do not form a plain chain.
    """
    record, others = CallRecord(blocks, StateCache(directory)), [*blocks, *output_heads(disk.model)]
    with disk.loaded_outside(others), _passing_on(disk, blocks), hooks(record.handles()):
        for batch in batches:
            record.start_batch()
            run_batch(disk.model, batch, disk.device)
            record.end_batch()
    if record.broken:
        raise ValueError(
            f"{disk.source.directory} cannot be worked on block by block, because {record.broken}; "
            "load it and use calibrate_"
        )
    return record


@contextmanager
def _passing_on(disk: ModelOnDisk, blocks: list[nn.Module]) -> Iterator[None]:
    """Blocks hand on the hidden states they get; the very first call is run, to see what goes along with them."""
    others: list[tuple | None] = []

    def forward(block: nn.Module, run: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not others:
            with disk.loaded(block):
                output = run(*args, **kwargs)
            others.append(output[1:] if isinstance(output, tuple) else None)
            return output
        states = args[0] if args else kwargs["hidden_states"]
        return states if others[0] is None else (states, *others[0])

    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            run = block.forward
            block.forward = lambda *args, _block=block, _run=run, **kwargs: forward(_block, _run, args, kwargs)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


def _look(
    disk: ModelOnDisk, record: CallRecord, layers: dict[str, nn.Module], options: Options, progress: bool
) -> LayerRecord:
    """Run the original model block after block; what `first_pass` finds out about the layers.

    Raises:
        ValueError: a weight that cannot be quantised, or a layer whose inputs are not finite.
    """
    observed, prepare = LayerRecord(layers), dataclasses.replace(options.config, step="prepare")
    with hooks(observed.handles()):
        for index, block in enumerate(tqdm(record.blocks, "checking", leave=False, disable=not progress)):
            own = _own(block, layers)
            with disk.loaded(block):
                _check_weights(own, prepare)
                for batch, calls in enumerate(record.calls):
                    observed.start_batch(batch)
                    args, kwargs = calls[index]
                    record.hidden[batch] = hidden_states_of(block(record.hidden[batch], *args, **kwargs))
                raise_problems(observed.problems(own))
    return observed
