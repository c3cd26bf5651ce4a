"""The decoder blocks of a model, and a record of their calls from which they can be run again one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: The call of a block: positional arguments after the hidden states, and keyword arguments.
Call = tuple[tuple, dict[str, Any]]


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
        calls: the other arguments, per batch and block. Tensors that all blocks share, as masks are, are held once.
        broken: why the blocks are not a chain, or None. Nothing is held then.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[Call]] = []
        self.broken: str | None = None if blocks else "there is no list of blocks"

    def start_batch(self) -> None:
        """Begin with the next batch."""
        self._states = self._output = None
        self.calls.append([])

    def end_batch(self) -> None:
        """Check that the batch went through all blocks."""
        if self.broken is None and len(self.calls[-1]) != len(self.blocks):
            self._break("not every block is called")

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
            self.calls[-1].append((tuple(args), kwargs))
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
        self.broken, self.hidden, self.calls = reason, [], [[]]
        self._states = self._output = None


def _is_plain(value: Any) -> bool:
    """Whether an argument can be passed a second time: not a cache that a first call has filled."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype, torch.device))
