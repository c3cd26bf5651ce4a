"""The decoder blocks of a model, and a record of their calls from which they can be run again one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from aaac_ao.hidden import StateCache

#: The call of a block: positional arguments after the hidden states, and keyword arguments.
Call = tuple[tuple, dict[str, Any]]
#: How many different argument tensors of blocks are compared with new ones.
_REMEMBERED = 16
#: Residual streams are found by the values of at most so many tokens, evenly spaced.
_COMPARED = 256
#: The shape of a tensor, and some of its vectors in fp32.
_Sample = tuple[torch.Size, torch.Tensor]


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


def hidden_states_of(output: Any) -> Any:
    """The hidden states among what a block returns: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


class CallRecord:
    """What the blocks are called with, as long as they form a chain that can be run again.

    In a chain every block is called once per batch, in order, on exactly what the block before it returned, leaves its
    input as it was, and takes only tensors and plain values besides.

    Attributes:
        hidden: the inputs of the first block, one tensor per batch.
        calls: the other arguments, per batch and block. Equal tensors, as masks and rotary tables are, are held once.
        broken: why the blocks are not a chain, or None. Nothing is held then.
    """

    def __init__(self, blocks: list[nn.Module], hidden: StateCache | None = None) -> None:
        self.blocks = blocks
        self.hidden = StateCache() if hidden is None else hidden
        self._known: list[torch.Tensor] = []
        self.calls: list[list[Call]] = []
        self.broken: str | None = None if blocks else "there is no list of blocks"

    def handles(self) -> list:
        """Register the hooks."""
        before = [block.register_forward_pre_hook(self.before, with_kwargs=True) for block in self.blocks]
        return before + [block.register_forward_hook(self.after) for block in self.blocks]

    def start_batch(self) -> None:
        """Begin with the next batch."""
        self._states = self._output = None
        self.calls.append([])

    def end_batch(self) -> None:
        """Check that the batch went through all blocks."""
        if self.broken is None and len(self.calls[-1]) != len(self.blocks):
            self._break("not every block is called")
        self._states = self._output = None

    def before(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record a call; a forward pre-hook with keyword arguments."""
        if self.broken is not None:
            return
        args, kwargs, index = list(args), dict(kwargs), len(self.calls[-1])
        states = args.pop(0) if args else kwargs.pop("hidden_states", None)
        if index >= len(self.blocks) or block is not self.blocks[index]:
            self._break("blocks are not called once each and in order")
        elif not isinstance(states, torch.Tensor) or not (_is_plain(args) and _is_plain(kwargs)):
            self._break("a block takes something else than tensors and plain values")
        elif index > 0 and states is not self._output and not torch.equal(states, self._output):
            self._break("hidden states change between the blocks")
        else:
            if index == 0:
                self.hidden.append(states)
            self.calls[-1].append((self._held_once(tuple(args)), self._held_once(kwargs)))
            self._states, self._version = states, states._version

    def after(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Note what a block returned; a forward hook."""
        if self.broken is not None:
            return
        self._output = hidden_states_of(output)
        if not isinstance(self._output, torch.Tensor):
            self._break("a block returns something else than hidden states")
        elif self._states._version != self._version:
            self._break("a block changes its input in place")

    def _break(self, reason: str) -> None:
        self.broken, self.hidden, self.calls = reason, StateCache(), [[]]
        self._states, self._output, self._known = None, None, []

    def _held_once(self, value: Any) -> Any:
        """The same arguments, with tensors replaced by equal ones that were seen before."""
        if isinstance(value, dict):
            return {key: self._held_once(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._held_once(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        for known in self._known:
            if known is value or (
                known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)
            ):
                return known
        self._known = [*self._known[-_REMEMBERED + 1 :], value]
        return value


def _is_plain(value: Any) -> bool:
    """Whether an argument can be passed a second time: not a cache that a first call has filled."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype, torch.device))


class Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Leaves a forward pass early."""


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()), None)


def captured_inputs(
    run: Callable[[], Any], sites: Iterable[nn.Module], until: nn.Module | None
) -> dict[nn.Module, list[torch.Tensor]]:
    """The inputs of modules during `run`, one per call; the run ends at the first call of `until`."""
    found: dict[nn.Module, list[torch.Tensor]] = {site: [] for site in sites}

    def keep(module, args, kwargs):
        found[module].append(input_of(args, kwargs))
        if module is until:
            raise Stop

    with hooks(site.register_forward_pre_hook(keep, with_kwargs=True) for site in found), suppress(Stop):
        run()
    return found


def residual_bases(block: nn.Module, run: Callable[[], Any], layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """For layers whose output is added to the residual stream: the module whose input is that stream before.

    Found by value, on one call of the block: an output y for which b + y appears, with b an input seen before the layer
    was called, and the sum an input of a later module or the output of the block.

    Args:
        block: a decoder block.
        run: calls the block once.
        layers: the layers in question, by name.
    """
    events: list[tuple[nn.Module, _Sample, bool]] = []  # module, tensor, whether it is a layer's output

    def before(module, args, kwargs):
        if isinstance(x := input_of(args, kwargs), torch.Tensor) and x.dim() > 1:
            events.append((module, _sample(x), False))

    def after(module, args, output):
        if isinstance(y := hidden_states_of(output), torch.Tensor) and y.dim() > 1:
            events.append((module, _sample(y), module is not block))

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in block.modules()]
    handles += [m.register_forward_hook(after) for m in (*layers.values(), block)]
    with hooks(handles):
        run()
    names, found = {module: name for name, module in layers.items()}, {}
    for position, (layer, y, is_output) in enumerate(events):
        if not is_output or layer in {e[0] for e in events[:position] if e[2]}:
            continue
        streams = [event for event in reversed(events[:position]) if not event[2]]
        sums = [event[1] for event in events[position + 1 :] if not event[2]]
        for site, base, _ in streams:
            if any(_is_sum(total, base, y) for total in sums):
                found[names[layer]] = site
                break
    return found


def _sample(x: torch.Tensor) -> _Sample:
    vectors = x.detach().flatten(0, -2)
    return x.shape, vectors[:: len(vectors) // _COMPARED + 1].to(torch.float32, copy=True)


def _is_sum(total: _Sample, base: _Sample, y: _Sample) -> bool:
    if not total[0] == base[0] == y[0]:
        return False
    added = total[1] - base[1]
    return bool((added - y[1]).norm() < 0.05 * added.norm())
