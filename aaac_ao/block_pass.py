"""One decoder block after the other: gather what its layers see, encode them, hand the hidden states on.

With `propagate="original"` every layer is encoded for its inputs in the original model. With "quantized", layers see
what the quantised layers before them give, stage by stage inside a block too, and are corrected towards the outputs of
the original model, which runs alongside (in the spirit of GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from aaac_ao.awq import find_pairs, fold, scaled, search_scale
from aaac_ao.blocks import CallRecord, captured_inputs, hidden_states_of, residual_bases
from aaac_ao.config import AAACConfig
from aaac_ao.encode import Encoding, OutputMetric, Statistics, encode, output_error
from aaac_ao.first_pass import LayerRecord
from aaac_ao.heap import hand_back_memory
from aaac_ao.moments import InputSums, gather, means
from aaac_ao.options import Options
from aaac_ao.resume import RunFolder
from aaac_ao.shifts import OutputShifts
from aaac_ao.tensor import AAACTensor
from aaac_ao.transform import set_weight

logger = logging.getLogger(__name__)

#: The relative error of a layer is summed over rows of about this many weights at a time.
_CHUNK_WEIGHTS = 1 << 18
#: Called with the name of an encoded layer, its relative output error, and how many layers were encoded with it.
Report = Callable[[str, float, int], None]


# encoding


def encode_stage(
    layers: Mapping[str, nn.Module],
    statistics: Statistics,
    shifts: OutputShifts | None,
    options: Options,
    report: Report,
) -> None:
    """Quantise layers that read the same input, with one pair of books for all of them if that is asked for.

    Raises:
        ValueError: statistics that cannot be used; the message names the layers.
    """
    fused = [list(layers)] if options.share_codebooks else [[name] for name in layers]
    for names in fused:
        together = {name: layers[name] for name in names}
        _encode_together(together, statistics, shifts, options, report, names is fused[-1])


def _encode_together(
    layers: Mapping[str, nn.Module],
    statistics: Statistics,
    shifts: OutputShifts | None,
    options: Options,
    report: Report,
    final: bool,
) -> None:
    """Quantise layers of a stage with the same books; nothing of their encoding is left for the next ones to bear."""
    names, weights = list(layers), [layer.weight.detach() for layer in layers.values()]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    parts = [] if shifts is None else [shifts.take(name, statistics.tokens) for name in names]
    shift = torch.cat(parts) if len(parts) > 1 else next(iter(parts), None)
    metrics = options.importance.metrics
    known = [metrics.pop(name) for name in names if name in metrics]
    metric = OutputMetric.joined(known) if len(known) == len(names) else None
    size = output_size(weight, statistics, metric)  # the encoder may give the statistics up
    try:
        encoding = encode(weight, options.config, statistics, shift, metric, final)
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: {error}") from None
    report(names[-1], relative_error(encoding, size), len(names))
    for name, part in zip(names, _split(encoding, [len(w) for w in weights]), strict=True):
        set_weight(layers[name], AAACTensor.from_encoding(part, options.config, layers[name].weight.dtype))


def relative_error(encoding: Encoding, size: torch.Tensor) -> float:
    """Root mean square error of the layer's output, as a share of that output, whose `output_size` is given."""
    return float((encoding.error / size.clamp(min=1e-300)).clamp(min=0).sqrt())


def output_size(weight: torch.Tensor, statistics: Statistics, metric: OutputMetric | None = None) -> torch.Tensor:
    """The sum of E[y^2] over all outputs, weighed by the metric, fp64 0-D."""
    if metric is not None:
        return output_error(weight.float(), statistics.hessian, metric)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for rows in weight.split(max(1, _CHUNK_WEIGHTS // weight.shape[1])):
        w = rows.float()
        against = w @ statistics.hessian if statistics.hessian is not None else w * statistics.second_moment
        total += (against.double() * w).sum()
    return total


def _split(encoding: Encoding, rows: list[int]) -> Iterator[Encoding]:
    parts = (part.split(rows) for part in (encoding.codes, encoding.selector, encoding.scale))
    for codes, selector, scale in zip(*parts, strict=True):
        yield dataclasses.replace(encoding, codes=codes, selector=selector, scale=scale)


def fold_awq(
    blocks: Sequence[nn.Module], statistics: dict[str, Statistics], names: Mapping[nn.Module, str], config: AAACConfig
) -> list[torch.Tensor | None]:
    """Search and fold the AWQ scales of blocks; `statistics` become those of the scaled inputs.

    Returns:
        The scale of every pair, None where there is nothing to scale.
    """
    scales: list[torch.Tensor | None] = []
    for pair in (pair for block in blocks for pair in find_pairs(block)):
        scales.append(None)
        if not all(names.get(layer) in statistics for layer in pair.layers):
            continue  # a layer that stays as it is, or was not reached
        own = statistics[names[pair.layers[0]]]
        scale = search_scale([layer.weight for layer in pair.layers], own, config)
        if scale is not None:
            shared = scaled(own, fold(pair, scale))
            statistics.update({names[layer]: shared for layer in pair.layers})
            scales[-1] = scale
    return scales


# one block


@contextmanager
def weights_of(layers: Mapping[str, nn.Module], weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Run with other weights for a while."""
    present = {name: layers[name].weight for name in weights}
    try:
        for name, weight in weights.items():
            layers[name].weight = weight
        yield
    finally:
        for name, weight in present.items():
            layers[name].weight = weight


class BlockPass:
    """Quantises the blocks of a chain in order.

    Args:
        record: the calls of the blocks and the inputs of the first one; consumed on the way.
        observed: the stages of the layers.
        layers: the layers to quantise, by name.
        options: how.
        report: hears of every encoded layer.
        folder: keeps finished blocks, or None.
        restore: give a block its weights back if it fails; else they are let go as soon as nothing needs them.
    """

    def __init__(
        self,
        record: CallRecord,
        observed: LayerRecord,
        layers: Mapping[str, nn.Module],
        options: Options,
        report: Report,
        folder: RunFolder | None = None,
        restore: bool = True,
    ) -> None:
        self.record, self.observed, self.layers, self.options = record, observed, layers, options
        self.report, self.folder, self.restore = report, folder, restore
        self.names = {module: name for name, module in layers.items()}
        self.original = record.hidden
        self.quantised = record.hidden.copy("quantized") if options.propagate == "quantized" else None
        self._changed = False  # whether the two streams differ

    def run(self, index: int, block: nn.Module) -> None:
        """Quantise the layers of a block and move the hidden states behind it."""
        own = {self.names[module]: module for module in block.modules() if module in self.names}
        stages = self.observed.stages_of(set(own))
        originals = {name: module.weight for name, module in own.items()}
        finished = None if self.folder is None else self.folder.load(index)
        try:
            if finished is not None:
                self._restore(block, own, *finished)
                self._leave_original(index, block, originals)
            elif self.quantised is None:
                scales = self._at_once(index, block, own, stages, originals)
            else:
                scales = self._stage_by_stage(index, block, own, stages, originals)
            if finished is None and self.folder is not None:
                self.folder.save(index, scales, {name: module.weight for name, module in own.items()})
        except BaseException:
            for name, weight in originals.items():
                own[name].weight = weight
            raise
        self._changed = self._changed or bool(own)
        if self.quantised is not None:
            self._advance(index, block, self.quantised)
        for calls in self.record.calls:
            calls[index] = ((), {})

    def gather(self, index: int, block: nn.Module, full: bool) -> list[tuple[list[str], InputSums]]:
        """What all layers of a block see in the original model; its hidden states move on."""
        own = {self.names[module]: module for module in block.modules() if module in self.names}
        run = partial(self._advance, index, block, self.original)
        return gather(own, self.observed.stages_of(set(own)), full, run, self.options.importance)

    def _at_once(
        self,
        index: int,
        block: nn.Module,
        own: dict[str, nn.Module],
        stages: list[list[str]],
        originals: dict[str, nn.Parameter],
    ) -> list[torch.Tensor | None]:
        statistics = means(self.gather(index, block, self.options.full))
        self._let_go(originals)
        scales = fold_awq([block], statistics, self.names, self.options.config) if self.options.awq else []
        quantise_stages(own, stages, statistics, self.options, self.report)
        return scales

    def _stage_by_stage(
        self,
        index: int,
        block: nn.Module,
        own: dict[str, nn.Module],
        stages: list[list[str]],
        originals: dict[str, nn.Parameter],
    ) -> list[torch.Tensor | None]:
        scales: list[torch.Tensor | None] = []
        if self.options.awq:
            run = lambda: [self._call(self.quantised, batch, index, block) for batch in range(len(self.original))]  # noqa: E731
            seen = means(gather(own, stages, False, run))
            scales = fold_awq([block], seen, self.names, self.options.config)
        once = partial(self._call, self.original, 0, index, block)
        bases = residual_bases(block, once, own) if self.options.full and own else {}
        for stage in stages:
            layers = {name: own[name] for name in stage}
            found = self._differences(index, block, layers, originals, bases, last=stage is stages[-1])
            if found is None:
                logger.warning("%s: no calibration token reaches it any more; left as it is", ", ".join(stage))
                continue
            hand_back_memory()
            encode_stage(layers, *found, self.options, self.report)
            del found
            hand_back_memory()
            self._changed = True
        if not stages:
            self._leave_original(index, block, originals)
        return scales

    def _differences(
        self,
        index: int,
        block: nn.Module,
        layers: dict[str, nn.Module],
        originals: dict[str, nn.Parameter],
        bases: dict[str, nn.Module],
        last: bool,
    ) -> tuple[Statistics, OutputShifts | None] | None:
        """Statistics of a stage in the quantised stream, and how far its layers' outputs should move.

        None if nothing reaches it. The second part is None where the streams do not differ or cannot be compared. With
        the last stage the original stream moves behind the block.
        """
        shifts = OutputShifts(layers, bases) if self.options.full and self._changed else None
        weights = self.options.importance.token_weights(list(layers))
        compare = partial(self._compare, index, block, layers, originals, weights)
        apart = last and shifts is not None and not self.restore
        if apart:  # one more pass, but the original weights are gone before there is a Hessian
            shifts = compare(None, shifts, leave=True)
            self._let_go(originals)
        first = next(iter(layers.values()))
        sums = InputSums.zeros(first.in_features, first.weight.device, self.options.full)
        others = compare(sums, None if apart else shifts, leave=last and not apart)
        if last and not apart:
            self._let_go(originals)
        if int(sums.tokens) == 0:
            return None
        return sums.statistics(in_place=True), shifts if apart else others

    def _compare(
        self,
        index: int,
        block: nn.Module,
        layers: dict[str, nn.Module],
        originals: dict[str, nn.Parameter],
        weights: list[torch.Tensor] | None,
        sums: InputSums | None,
        shifts: OutputShifts | None,
        leave: bool,
    ) -> OutputShifts | None:
        """Add what a stage sees to the sums, and how it differs to the shifts; these, or None if it cannot be told.

        `weights` are those of the tokens of every batch, None if they count alike.

        With `leave` the original stream moves behind the block on the way: nothing runs its original weights again.

        Raises:
            ValueError: inputs in the quantised stream that are not finite.
        """
        names, first = list(layers), next(iter(layers.values()))
        sites = {first} if shifts is None else {first, *shifts.sites}
        until = None if names[0] in self.observed.repeated else first
        finite = []
        for batch in range(len(self.original)):
            now = captured_inputs(partial(self._call, self.quantised, batch, index, block), sites, until)
            own = None if weights is None else weights[batch]
            if sums is not None:
                for x in now[first]:
                    sums.add(x, own)
                finite.append(torch.isfinite(sums.squares.sum()))
            if shifts is None and not leave:
                continue
            with weights_of(self.layers, originals):
                run = partial(self._move if leave else self._call, self.original, batch, index, block)
                then = captured_inputs(run, sites, None if leave else until)
            if shifts is not None and [x.shape for x in now[first]] != [x.shape for x in then[first]]:
                shifts = None  # tokens are routed differently
            if shifts is not None:
                shifts.add(then, now, own)
        if finite and not bool(finite[-1]):
            bad = [bool(good) for good in finite].index(False)
            raise ValueError(
                f"{', '.join(names)}: after the layers before it were quantised, calibration batch {bad} gives it NaN, "
                "infinite or huge inputs; this block is as it was"
            )
        return shifts

    def _leave_original(self, index: int, block: nn.Module, originals: dict[str, nn.Parameter]) -> None:
        """Move the hidden states of the original model behind the block: nothing runs its original weights again."""
        with weights_of(self.layers, originals):
            self._advance(index, block, self.original)
        self._let_go(originals)

    def _let_go(self, originals: dict[str, nn.Parameter]) -> None:
        if not self.restore:
            originals.clear()
        hand_back_memory()

    def _restore(
        self,
        block: nn.Module,
        own: dict[str, nn.Module],
        scales: list[torch.Tensor | None],
        weights: dict[str, AAACTensor],
    ) -> None:
        if self.options.awq:
            for pair, scale in zip(find_pairs(block), scales, strict=True):
                if scale is not None:
                    fold(pair, scale.to(pair.layers[0].weight.device))
        for name, weight in weights.items():
            set_weight(own[name], weight.to(own[name].weight.device))
            self.report(name, float("nan"), 1)

    def _call(self, stream, batch: int, index: int, block: nn.Module) -> torch.Tensor:
        args, kwargs = self.record.calls[batch][index]
        return hidden_states_of(block(stream[batch], *args, **kwargs))

    def _move(self, stream, batch: int, index: int, block: nn.Module) -> None:
        stream[batch] = self._call(stream, batch, index, block)

    def _advance(self, index: int, block: nn.Module, stream) -> None:
        for batch in range(len(stream)):
            self._move(stream, batch, index, block)


def quantise_stages(
    layers: Mapping[str, nn.Module],
    stages: list[list[str]],
    statistics: dict[str, Statistics],
    options: Options,
    report: Report,
) -> None:
    """Encode all stages for which there are statistics; these are taken out and gone as soon as they are used."""
    for stage in stages:
        if stage[0] in statistics:
            encode_stage({name: layers[name] for name in stage}, statistics[stage[0]], None, options, report)
            for name in stage:
                del statistics[name]
