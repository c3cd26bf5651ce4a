"""The demo's main job: quantise one model with several methods and measure what each of them lost."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_
from tqdm import tqdm

from aaac_ao.blocks import find_blocks
from aaac_ao.calibrate import calibrate_
from aaac_ao.config import AAACConfig
from aaac_ao.demo import corpus
from aaac_ao.evaluate import (
    Evaluation,
    evaluate,
    gap_recovered,
    linear_bits_per_weight,
    unigram_perplexity,
    windows_of,
)

MODEL_DIRECTORY = Path(__file__).parent / "model"
WINDOW = 512
CALIBRATION_WINDOWS = 64

#: (format, group size, its methods): the first method of each is round-to-nearest on the format's own grid.
SETTINGS: tuple[tuple[str, int, tuple[tuple[str, dict[str, Any]], ...]], ...] = tuple(
    (
        name,
        group_size,
        (
            ("RTN", {"codebooks": grid, "scale_search": False}),
            ("NF4", {"codebooks": "nf4", "scale_search": False}),
            ("BOF4-S", {"codebooks": "bof4-s", "scale_search": False}),
            ("IF4", {"codebooks": "if4", "scale_search": False}),
            ("AAAC, nearest", {"rounding": "nearest"}),
            ("AAAC", {}),
        ),
    )
    for name, group_size, grid in (("nvfp4", 16, "fp4"), ("int4", 64, "int4"))
)


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        method, format, group_size: what was done; format and group size are None for the original.
        bits: stored bits per weight of the quantised layers, true to the byte.
        megabytes: stored size of those layers.
        evaluation: perplexity and KL to the original.
        kl_recovered, perplexity_recovered: share of round-to-nearest's loss won back, None for the original.
        seconds: calibration, where a method uses data, and encoding.
    """

    method: str
    format: str | None
    group_size: int | None
    bits: float
    megabytes: float
    evaluation: Evaluation
    kl_recovered: float | None = None
    perplexity_recovered: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`: the rows, the quantised AAAC models by format, and the perplexity of a unigram model."""

    rows: list[Row]
    models: dict[str, nn.Module]
    unigram_perplexity: float


def load_demo_model() -> tuple[nn.Module, Any]:
    """The shipped model in fp32, and its tokenizer."""
    from transformers import AutoTokenizer

    from aaac_ao.integrations.transformers import load_model

    return load_model(MODEL_DIRECTORY, torch.float32), AutoTokenizer.from_pretrained(MODEL_DIRECTORY)


def compare(model: nn.Module, tokenizer: Any, windows: int = 64, progress: bool = True) -> Comparison:
    """Quantise copies of `model` with every method of `SETTINGS` and evaluate them on the held-out modules.

    Args:
        model: the original, in fp32.
        tokenizer: its tokenizer.
        windows: evaluation windows of 512 tokens.
        progress: show progress bars.
    """
    training = corpus.token_stream(tokenizer, corpus.training_texts())
    held_out = windows_of(corpus.token_stream(tokenizer, corpus.held_out_texts()), WINDOW, windows)
    calibration = windows_of(training, WINDOW, CALIBRATION_WINDOWS).split(8)
    original = evaluate(model, held_out, model)
    weights = sum(layer.weight.numel() for layer in _layers(model))
    rows = [Row("original (bf16)", None, None, 16.0, weights * 2 / 1e6, original)]
    models: dict[str, nn.Module] = {}
    baseline = original  # replaced by each setting's first method, RTN
    plan = [(f, g, method, kwargs) for f, g, methods in SETTINGS for method, kwargs in methods]
    bar = tqdm(plan, disable=not progress)
    for format_name, group_size, method, kwargs in bar:
        bar.set_description(f"{format_name} {method}")
        config = AAACConfig(format=format_name, group_size=group_size, **kwargs)
        quantised, seconds = _quantised_copy(model, config, calibration)
        result = evaluate(quantised, held_out, model)
        if method == "RTN":
            baseline = result
        bits = linear_bits_per_weight(_layers(quantised))
        row = Row(method, format_name, group_size, bits, bits * weights / 8e6, result)
        rows.append(
            dataclasses.replace(
                row,
                kl_recovered=gap_recovered(result.kl, baseline.kl, 0.0),
                perplexity_recovered=gap_recovered(result.perplexity, baseline.perplexity, original.perplexity),
                seconds=seconds,
            )
        )
        if method == "AAAC":
            models[format_name] = quantised
    return Comparison(rows, models, unigram_perplexity(training, held_out, model.config.vocab_size))


def _quantised_copy(model: nn.Module, config: AAACConfig, calibration: Any) -> tuple[nn.Module, float]:
    """A quantised copy of the model, and the seconds it took."""
    quantised = copy.deepcopy(model)
    start = time.perf_counter()
    if config.codebooks == "learned":
        calibrate_(quantised, config, calibration, progress=False)
    else:
        for block in find_blocks(quantised):
            quantize_(block, config)  # plain rounding looks at no data
    return quantised, time.perf_counter() - start


def _layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of the blocks: those that are quantised."""
    return [module for block in find_blocks(model) for module in block.modules() if isinstance(module, nn.Linear)]


def table(comparison: Comparison) -> str:
    """The comparison as a Markdown table."""
    from tabulate import tabulate

    header = ["format", "method", "bits/weight", "MB", "perplexity", "KL to original", "KL gap", "ppl gap", "seconds"]
    lines = []
    for row in comparison.rows:
        setting = "" if row.format is None else f"{row.format} g{row.group_size}"
        lines.append(
            [
                setting,
                row.method,
                f"{row.bits:.3f}",
                f"{row.megabytes:.2f}",
                f"{row.evaluation.perplexity:.3f}",
                f"{row.evaluation.kl:.5f}",
                _percent(row.kl_recovered),
                _percent(row.perplexity_recovered),
                "" if row.seconds is None else f"{row.seconds:.1f}",
            ]
        )
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
