"""Models to quantise and the texts to calibrate and evaluate them on, for `benchmarks.quality`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aaac_ao.demo import compare, corpus
from aaac_ao.evaluate import windows_of

DEMO = "demo"
WINDOW = 512
#: Above this, the logits of the original are computed anew for every method.
CACHED_BYTES = 2 << 30


@dataclass(frozen=True)
class Subject:
    """A model with its data.

    Attributes:
        name: as shown.
        directory: where the scripts load it from.
        model: the original in fp32.
        held_out: evaluation windows [count, tokens].
        calibration: (number of windows, seed) -> calibration windows [count, tokens].
        data: one line on both texts.
    """

    name: str
    directory: Path
    model: nn.Module
    held_out: torch.Tensor
    calibration: Callable[[int, int], torch.Tensor]
    data: str


def load(name: str, windows: int, text: Path | None = None, calibration_text: Path | None = None) -> Subject:
    """The demo model on the standard library, or a model directory on text files.

    Args:
        name: "demo" or a directory in transformers' format.
        windows: evaluation windows, at most.
        text: what a model directory is evaluated on.
        calibration_text: what it is calibrated on; None: text that the model itself writes.

    Raises:
        ValueError: a directory without `text`, or a text shorter than one window.
    """
    if name == DEMO:
        model, tokenizer = compare.load_demo_model()
        training = corpus.token_stream(tokenizer, corpus.training_texts())
        held_out = corpus.token_stream(tokenizer, corpus.held_out_texts())
        cut = lambda count, seed: random_windows(training, count, WINDOW, seed)  # noqa: E731
        data = f"calibrated on Python's standard library ({len(training)} tokens), evaluated on modules held out"
        return Subject(name, compare.MODEL_DIRECTORY, model, windows_of(held_out, WINDOW, windows), cut, data)
    if text is None:
        raise ValueError(f"{name} needs --text FILE to be evaluated on")
    from transformers import AutoTokenizer

    from aaac_ao.integrations.transformers import load_model

    model, tokenizer = load_model(name, torch.float32), AutoTokenizer.from_pretrained(name)
    length = min(WINDOW, model.config.max_position_embeddings)
    held_out = windows_of(_ids(tokenizer, text), length, windows)
    if calibration_text is None:
        cut = lambda count, seed: written_by(model, count, length, seed)  # noqa: E731
        data = f"calibrated on text sampled from the model itself, evaluated on {text.name}"
    else:
        ids = _ids(tokenizer, calibration_text)
        cut = lambda count, seed: random_windows(ids, count, length, seed)  # noqa: E731
        data = f"calibrated on {calibration_text.name} ({len(ids)} tokens), evaluated on {text.name}"
    return Subject(Path(name).resolve().name, Path(name).resolve(), model, held_out, cut, data)


def _ids(tokenizer: Any, path: Path) -> torch.Tensor:
    return torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])


def random_windows(ids: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """Windows [count, length] from random places of a token stream, the same for the same seed.

    Raises:
        ValueError: fewer tokens than one window.
    """
    if len(ids) < length:
        raise ValueError(f"{len(ids)} calibration tokens are fewer than one window of {length}; give a longer text")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (count, 1), generator=generator)
    return ids[starts + torch.arange(length)]


@torch.no_grad()
def written_by(model: nn.Module, count: int, length: int, seed: int, batch_size: int = 64) -> torch.Tensor:
    """Windows [count, length] sampled from the model, from its start token on; an end of text starts the next one."""
    start = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in torch.arange(count).split(batch_size):
        ids = [torch.full((len(size), 1), start)]
        cache = None
        for _ in range(length - 1):
            output = model(ids[-1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids.append(torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator))
        batches.append(torch.cat(ids, dim=1))
    return torch.cat(batches)


class Replayed(nn.Module):
    """A model that computes the logits of every batch once, as long as they fit into `CACHED_BYTES`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._outputs: dict[bytes, Any] = {}
        self._size = 0

    def forward(self, ids: torch.Tensor) -> Any:
        """The model's output for token ids [batch, tokens]."""
        key = ids.cpu().numpy().tobytes()
        if key in self._outputs:
            return self._outputs[key]
        output = self.model(ids, use_cache=False)
        self._size += output.logits.numel() * output.logits.element_size()
        if self._size <= CACHED_BYTES:
            self._outputs[key] = output
        return output
