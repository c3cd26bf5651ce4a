"""Greedy generation with a static key-value cache and a compiled decode step, in the manner of gpt-fast."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Generation:
    """Result of `generate`.

    Attributes:
        ids: [prompt + new] token ids, 1-D, on the CPU.
        tokens_per_second: decode rate, compilation and prefill not counted.
        compile_seconds: time of the first decode step, compilation included.
    """

    ids: torch.Tensor
    tokens_per_second: float
    compile_seconds: float


@torch.no_grad()
def generate(model: nn.Module, prompt: torch.Tensor, new_tokens: int, compile_step: bool = True) -> Generation:
    """Continue one prompt greedily with a transformers causal language model.

    Args:
        model: the model; quantised or not.
        prompt: 1-D token ids, at least one.
        new_tokens: how many tokens to add, at least 2.
        compile_step: compile the decode step as one full graph.

    Raises:
        ValueError: an empty prompt, fewer than 2 new tokens, or more tokens than the model has positions.
    """
    from transformers import StaticCache

    length = len(prompt) + new_tokens
    if prompt.dim() != 1 or len(prompt) == 0 or new_tokens < 2:
        raise ValueError(f"need a 1-D prompt and at least 2 new tokens, got {list(prompt.shape)} and {new_tokens}")
    if length > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(f"{length} tokens do not fit the model's {limit} positions; shorten the prompt")
    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=length)
    prompt = prompt.to(device)

    def step(ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        out = model(ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    decode = torch.compile(step, fullgraph=True) if compile_step else step
    token = step(prompt[None], torch.arange(len(prompt), device=device)[None])
    tokens, marks = [token], [time.perf_counter()]
    for position in range(len(prompt), length - 1):
        token = decode(token.clone(), torch.tensor([[position]], device=device))
        tokens.append(token)
        if position == len(prompt):
            marks.append(_now(device))
    marks.append(_now(device))
    rate = (new_tokens - 2) / max(marks[2] - marks[1], 1e-9)
    return Generation(torch.cat([prompt, *(t.flatten() for t in tokens)]).cpu(), rate, marks[1] - marks[0])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
