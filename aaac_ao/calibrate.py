"""`calibrate_`: quantise a model with data in one call, one decoder block after the other.

A first pass over the data runs the original model once, to refuse bad data before anything changes and to keep the
inputs of the first block. Then every block is gone through (`block_pass`): only its own statistics are alive. A model
whose blocks do not form a plain chain is observed as a whole. Kept meanwhile, in main memory or on disk: the hidden
states of all batches between two blocks, once for each stream of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from aaac_ao.block_pass import BlockPass, Report, fold_awq, quantise_stages
from aaac_ao.blocks import CallRecord, find_blocks
from aaac_ao.config import AAACConfig
from aaac_ao.first_pass import (
    Batch,
    LayerRecord,
    checked_batches,
    first_pass,
    layers_outside,
    output_heads,
    ready_to_run,
    report_coverage,
    run_batch,
)
from aaac_ao.fisher import importance_of
from aaac_ao.hidden import StateCache, hidden_directory
from aaac_ao.moments import InputSums, gather, means
from aaac_ao.options import Options
from aaac_ao.resume import RunFolder, fingerprint
from aaac_ao.statistics import StatisticsFile, write_statistics
from aaac_ao.transform import is_left_alone, problem_with, raise_problems

logger = logging.getLogger(__name__)

FilterFn = Callable[[nn.Module, str], bool]


def calibrate_(
    model: nn.Module,
    config: AAACConfig,
    batches: Iterable[Batch] | None = None,
    filter_fn: FilterFn | None = None,
    progress: bool = True,
    *,
    propagate: str | None = None,
    awq: bool = False,
    share_codebooks: bool = False,
    fisher: bool = False,
    statistics: str | Path | None = None,
    resume_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    strict: bool = False,
) -> nn.Module:
    """Quantise the linear layers of `model` in place, for what they see in `batches`.

    Transformers models are worked on block by block; a model without a list of decoder blocks is observed as a whole.
    When a run is stopped, the blocks that are done stay quantised and the others stay as they were.

    Args:
        model: the model; its training mode is kept.
        config: the settings; `step` is ignored. With data, rounding="auto" means "gptq".
        batches: token ids [batch, tokens], or dicts of keyword arguments of the model.
        filter_fn: (module, qualified name) -> whether to quantise; default: every nn.Linear except the output head.
        progress: show a progress bar.
        propagate: "original": every layer is encoded for its inputs in the original model, in one pass; "quantized":
            for what the quantised layers before it give, and corrected towards the original outputs, which takes
            about four times the passes and a second set of hidden states, and loses less. Default: "quantized" with
            second-order rounding, "original" with nearest.
        awq: scale input channels first, folded into the layers before them (AWQ, arXiv 2306.00978).
        share_codebooks: one pair of codebooks, and one per-tensor scale, for all layers that read the same input
            (q/k/v, gate/up), so that serving stacks can fuse them.
        fisher: weigh errors of outputs by how much they, alone and together, change the model's predictions, weigh
            tokens likewise (`importance_of`), and let rows of a weight make up for each other. Needs one backward pass
            over the data, whose memory is that of one batch in training without optimiser, a matrix for the outputs
            of every layer with no more outputs than inputs, or few of them, and 2 bytes for every token and layer;
            loses less. Not with `awq`.
        statistics: a file of `collect_statistics` or `merge_statistics` to use instead of batches.
        resume_dir: keep finished blocks in this directory, and take those that are there from it: the same call on the
            same original model goes on where an earlier one was stopped, with the same bits as without the stop.
        cache_dir: keep hidden states in files under this directory instead of in main memory.
        strict: raise an error, and not just a warning, if a selected layer is never reached by the data.

    Returns:
        The same model.

    Raises:
        TypeError: a batch that is neither a tensor nor a mapping.
        ValueError: not exactly one of batches and statistics; no layer selected; weights or activations that are NaN
            or infinite; with `strict`, a layer that no batch reaches; a `resume_dir` of another run. Nothing was
            changed then.
        OSError: `resume_dir` or `cache_dir` cannot be written to.
    """
    if (batches is None) == (statistics is None):
        raise ValueError("give either batches or a statistics file")
    if fisher and statistics is not None:
        raise ValueError("fisher=True needs batches: a statistics file does not hold what outputs matter")
    options = Options.of(config, propagate, awq, share_codebooks, fisher)
    layers = _layers_to_quantise(model, config, filter_fn)
    if not layers:
        return model
    with reporting(len(layers), progress) as report:
        if statistics is not None:
            if resume_dir is not None:
                raise ValueError("resume_dir is of no use with a statistics file: nothing there takes long")
            _quantise_from_file(model, layers, StatisticsFile(statistics), options, report, strict)
            return model
        batches = checked_batches(batches)
        folder = None
        if resume_dir is not None:
            rows = (row for module in layers.values() for row in (module.weight[:1], module.weight[-1:]))
            device = next(iter(layers.values())).weight.device
            folder = RunFolder(resume_dir, fingerprint(layers, rows, batches, options.settings(), device))
        if fisher:
            options = dataclasses.replace(options, importance=importance_of(model, batches, layers, progress))
        with _prepared(model, batches, layers, cache_dir, strict) as (record, observed, blocks):
            layers = {name: module for name, module in layers.items() if observed.tokens[name]}
            outside = layers_outside(layers, blocks)
            _quantise_together(model, outside, observed, options, batches, report)
            block_pass = BlockPass(record, observed, layers, options, report, folder)
            for index, block in enumerate(blocks):
                block_pass.run(index, block)
    return model


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    path: str | Path,
    filter_fn: FilterFn | None = None,
    progress: bool = True,
    *,
    full: bool = True,
    cache_dir: str | Path | None = None,
) -> None:
    """Write the second moments of the inputs of all selected layers to a file, and leave the model as it is.

    Files made from different data add up with `merge_statistics`, and `calibrate_(..., statistics=file)` quantises with
    them. Works block by block: no more than one block's statistics are in memory.

    Args:
        model: the original model.
        batches: see `calibrate_`.
        path: the file to write, in safetensors format.
        filter_fn: see `calibrate_`.
        progress: show a progress bar.
        full: whole matrices of second moments, for second-order rounding, not just their diagonals.
        cache_dir: see `calibrate_`.

    Raises:
        TypeError, ValueError: as in `calibrate_`.
        OSError: the file cannot be written.
    """
    layers = _layers_to_quantise(model, AAACConfig(format="nvfp4"), filter_fn)
    batches = checked_batches(batches)
    with _prepared(model, batches, layers, cache_dir, strict=False) as (record, observed, blocks):
        layers = {name: module for name, module in layers.items() if observed.tokens[name]}
        outside = layers_outside(layers, blocks)
        config = AAACConfig(rounding="auto" if full else "nearest")
        block_pass = BlockPass(record, observed, layers, Options(config, "original"), lambda name, error: None)
        names = {module: name for name, module in layers.items()}
        within = [{names[m] for m in block.modules() if m in names} for block in blocks]
        stages = [stage for part in (set(outside), *within) for stage in observed.stages_of(part)]

        def entries() -> Iterator[InputSums]:
            run = lambda: [run_batch(model, batch) for batch in batches]  # noqa: E731
            if outside:
                yield from (sums for _, sums in gather(outside, observed.stages_of(set(outside)), full, run))
            for index, block in enumerate(tqdm(blocks, desc="collecting statistics", disable=not progress)):
                yield from (sums for _, sums in block_pass.gather(index, block, full))

        sizes = [(stage, layers[stage[0]].in_features) for stage in stages]
        write_statistics(path, sizes, full, entries())


# what to quantise


def selected_layers(model: nn.Module, filter_fn: FilterFn | None = None) -> dict[str, nn.Module]:
    """The linear layers, by name, that `filter_fn` selects; by default all but the output head."""
    heads = output_heads(model)
    if filter_fn is None:
        filter_fn = lambda module, name: module not in heads  # noqa: E731
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and filter_fn(m, n)}


def _layers_to_quantise(model: nn.Module, config: AAACConfig, filter_fn: FilterFn | None) -> dict[str, nn.Module]:
    """The selected layers that are not quantised already, all of them checked."""
    layers = selected_layers(model, filter_fn)
    if not layers:
        raise ValueError("no nn.Linear is selected: check filter_fn")
    prepare = dataclasses.replace(config, step="prepare")
    raise_problems({name: p for name, m in layers.items() if (p := problem_with(m.weight, prepare)) is not None})
    layers = {name: module for name, module in layers.items() if not is_left_alone(module.weight, prepare)}
    if not layers:
        logger.warning("every selected layer is quantised already or smaller than group_size %d", config.group_size)
    return layers


# progress


@contextmanager
def reporting(total: int, progress: bool) -> Iterator[Report]:
    """A progress bar over so many layers, and what to call for every layer that is encoded."""
    with tqdm(total=total, desc="quantising layers", disable=not progress, unit="layer") as bar:

        def report(name: str, error: float, count: int = 1) -> None:
            logger.info("%s: relative output error %.4f", name, error)
            bar.set_postfix_str(f"{name}, error {100 * error:.2f} %")
            bar.update(count)

        yield report


@contextmanager
def _prepared(
    model: nn.Module, batches: list[Batch], layers: dict[str, nn.Module], cache_dir: str | Path | None, strict: bool
) -> Iterator[tuple[CallRecord, LayerRecord, list[nn.Module]]]:
    """The records of a first pass and the blocks to go through one by one, in a state to run the model again."""
    with hidden_directory(cache_dir) as directory, ready_to_run(model, layers):
        record, observed = first_pass(model, batches, layers, StateCache(directory))
        report_coverage(observed, layers, strict)
        if record.blocks and record.broken:
            logger.info("observing the model as a whole, because %s", record.broken)
        yield record, observed, [] if record.broken else record.blocks


# quantising without going block by block


def _quantise_together(
    model: nn.Module,
    layers: dict[str, nn.Module],
    observed: LayerRecord,
    options: Options,
    batches: list[Batch],
    report: Callable,
) -> None:
    """Quantise layers outside the blocks for their inputs in the original model, with full passes."""
    if not layers:
        return
    stages = observed.stages_of(set(layers))
    run = lambda: [run_batch(model, batch) for batch in batches]  # noqa: E731
    statistics = means(gather(layers, stages, options.full, run, options.importance))
    quantise_stages(layers, stages, statistics, options, report)


def _quantise_from_file(
    model: nn.Module,
    layers: dict[str, nn.Module],
    file: StatisticsFile,
    options: Options,
    report: Callable,
    strict: bool,
) -> None:
    rounding = options.config.rounding
    if options.config.needs_hessian and not file.full:
        raise ValueError(
            f"{file.path} holds diagonals only, and rounding={rounding!r} needs full=True in collect_statistics"
        )
    missing = [name for name in layers if name not in file.layers]
    if missing and (strict or len(missing) == len(layers)):
        raise_problems(dict.fromkeys(missing, f"{file.path} has no statistics of it"))
    if missing:
        logger.warning("%s has no statistics of %s: left in high precision", file.path, ", ".join(missing))
    file.check_shapes({name: module.in_features for name, module in layers.items()})
    blocks = find_blocks(model)
    parts = [(block, [n for n, m in layers.items() if m in set(block.modules())]) for block in blocks]
    parts.append((None, list(layers_outside(layers, blocks))))
    names_of = {module: name for name, module in layers.items()}
    with torch.no_grad():
        for block, names in parts:
            if names:
                statistics = file.statistics(names, layers[names[0]].weight.device)
                if options.awq and block is not None:
                    fold_awq([block], statistics, names_of, options.config)
                quantise_stages(layers, file.stages(names), statistics, options, report)
