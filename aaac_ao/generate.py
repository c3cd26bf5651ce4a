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
        ids: [prompt + new] token ids, or [batch, prompt + new] for a batch of prompts, on the CPU.
        tokens_per_second: decode rate over all sequences, compilation and prefill not counted.
        compile_seconds: time of the first decode steps, compilation included.
    """

    ids: torch.Tensor
    tokens_per_second: float
    compile_seconds: float


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: torch.Tensor,
    new_tokens: int,
    compile_step: bool = True,
    compile_mode: str | None = None,
) -> Generation:
    """Continue one prompt, or a batch of equally long ones, greedily with a transformers causal language model.

    Args:
        model: the model; quantised or not.
        prompt: token ids, [tokens] or [batch, tokens], not empty.
        new_tokens: how many tokens to add to each prompt, at least 2.
        compile_step: compile the decode step as one full graph.
        compile_mode: `mode` of `torch.compile`; "reduce-overhead" decodes with CUDA graphs.

    Raises:
        ValueError: an empty prompt, fewer than 2 new tokens, or more tokens than the model has positions.
    """
    from transformers import StaticCache

    if prompt.dim() not in (1, 2) or prompt.numel() == 0 or new_tokens < 2:
        raise ValueError(
            f"need prompts of shape [tokens] or [batch, tokens] and at least 2 new tokens, "
            f"got {list(prompt.shape)} and {new_tokens}"
        )
    prompts = prompt if prompt.dim() == 2 else prompt[None]
    batch, given = prompts.shape
    length = given + new_tokens
    if length > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(f"{length} tokens do not fit the model's {limit} positions; shorten the prompt")
    device = next(model.parameters()).device
    cache = StaticCache(config=model.config, max_cache_len=length)
    prompts = prompts.to(device)
    # the first step compiles; with CUDA graphs, the second warms up and the third records
    warm_steps = min(1 if compile_mode is None else 3, new_tokens - 1)

    def step(ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        out = model(ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    decode = torch.compile(step, fullgraph=True, mode=compile_mode) if compile_step else step
    token = step(prompts, torch.arange(given, device=device).expand(batch, -1))
    tokens, marks = [token], [_now(device)]
    for number in range(1, new_tokens):
        # a CUDA graph overwrites its output when it runs again
        token = decode(token, torch.full((batch, 1), given + number - 1, device=device)).clone()
        tokens.append(token)
        if number == warm_steps:
            marks.append(_now(device))
    marks.append(_now(device))
    rate = batch * (new_tokens - 1 - warm_steps) / max(marks[2] - marks[1], 1e-9)
    return Generation(torch.cat([prompts, *tokens], 1).view(*prompt.shape[:-1], -1).cpu(), rate, marks[1] - marks[0])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
