"""`AAACConfig`: what the user asks for, and everything needed to read a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torchao.core.config import AOBaseConfig

from aaac_ao.codebooks import FIXED_CODEBOOKS
from aaac_ao.formats import FORMATS, ScaleFormat

STEPS = (None, "prepare", "convert", "prepare_for_loading")
ROUNDINGS = ("auto", "nearest", "gptq", "gptq-thorough")


@dataclass
class AAACConfig(AOBaseConfig):
    """4-bit weights with two codebooks per layer (AAAC, arXiv 2605.08692), for `torchao.quantization.quantize_`.

    Attributes:
        format: "int4" (bf16 group scales) or "nvfp4" (groups of 16, E4M3 scales, one fp32 scale per tensor).
        group_size: weights per scale; int4: 128 (default), 64 or 32; nvfp4: 16.
        codebooks: "learned" (two books per layer, activation-weighted k-means), or a fixed grid: "int4", "fp4",
            "nf4", "bof4", "bof4-s", "if4".
        rounding: "gptq": second-order rounding with the full matrix of the inputs' second moments (in_features^2 fp32
            numbers per observed layer), which needs data; "gptq-thorough": the same and more passes, for many times as
            long; "nearest": their diagonal alone; "auto": "gptq" with data, "nearest" without.
        scale_search: search every group's scale together with its book. With fixed codebooks and no search the result
            is exactly round-to-nearest on that grid.
        iterations: k-means iterations of the learned books.
        step: None quantises at once, without data. "prepare" starts observing the inputs of the layers, "convert"
            quantises with what was observed; "prepare_for_loading" makes uninitialised weights that a checkpoint fills.
        version: version of these fields in a checkpoint.

    Raises:
        ValueError: a value that is not listed above.
        TypeError: a value of the wrong type.
    """

    format: str = "int4"
    group_size: int | None = None
    codebooks: str = "learned"
    rounding: str = "auto"
    scale_search: bool = True
    iterations: int = 20
    step: str | None = None
    version: int = 1

    def __post_init__(self) -> None:
        torch._C._log_api_usage_once("aaac_ao.AAACConfig")
        _check_choice("format", self.format, tuple(FORMATS))
        _check_choice("codebooks", self.codebooks, ("learned", *FIXED_CODEBOOKS))
        _check_choice("rounding", self.rounding, ROUNDINGS)
        # torchao's QuantizationStep is a str enum: keep its plain value, so that the config stays JSON-safe
        self.step = getattr(self.step, "value", self.step)
        _check_choice("step", self.step, STEPS)
        allowed = self.scale_format.group_sizes
        if self.group_size is None:
            self.group_size = allowed[0]
        _check_integer("group_size", self.group_size)
        if self.group_size not in allowed:
            raise ValueError(
                f"group_size {self.group_size} is not supported by format {self.format!r}; use {_or(allowed)}"
            )
        _check_integer("iterations", self.iterations)
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        _check_integer("version", self.version)
        if self.version != 1:
            raise ValueError(f"version {self.version} is not known to this aaac_ao, which writes 1; upgrade aaac_ao")
        if not isinstance(self.scale_search, bool):
            raise TypeError(f"scale_search must be a bool, got {self.scale_search!r}")

    @property
    def needs_hessian(self) -> bool:
        """Whether nothing can be quantised without second moments of the inputs."""
        return self.rounding in ("gptq", "gptq-thorough")

    @property
    def scale_format(self) -> ScaleFormat:
        """The scale format that `format` names."""
        return FORMATS[self.format]


def aaac_config(**kwargs: Any) -> AAACConfig:
    """`AAACConfig(**kwargs)`, in the spelling of a function.

    Raises:
        TypeError: an unknown field, with the known ones listed.
    """
    known = [field.name for field in fields(AAACConfig)]
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise TypeError(f"unknown field {', '.join(unknown)}; AAACConfig has: {', '.join(known)}")
    return AAACConfig(**kwargs)


def _or(values: tuple) -> str:
    return " or ".join(repr(value) for value in values)


def _check_choice(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {_or(allowed)}, got {value!r}")


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
