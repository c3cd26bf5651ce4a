"""What `benchmarks.quality` compares: the table of our own methods, and how methods are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

#: (format, group size) of our methods, and the grid that round-to-nearest uses there.
SETTINGS = {
    "nvfp4-g16": ("nvfp4", 16, "fp4"),
    "int4-g128": ("int4", 128, "int4"),
    "int4-g64": ("int4", 64, "int4"),
    "int4-g32": ("int4", 32, "int4"),
}
#: The common scale: every method is compared with round-to-nearest of this setting, too.
COMMON = "int4-g32"
RTN = "RTN"
GRID = "the grid of the format"

#: (name, fields of AAACConfig besides the format, arguments of calibrate_ or None for methods that use no data).
OURS: tuple[tuple[str, dict[str, Any], dict[str, Any] | None], ...] = (
    (RTN, {"codebooks": GRID, "scale_search": False}, None),
    ("NF4", {"codebooks": "nf4", "scale_search": False}, None),
    ("BOF4", {"codebooks": "bof4", "scale_search": False}, None),
    ("BOF4-S", {"codebooks": "bof4-s", "scale_search": False}, None),
    ("IF4", {"codebooks": "if4", "scale_search": False}, None),
    ("AAAC nearest, no scale search", {"rounding": "nearest", "scale_search": False}, {}),
    ("AAAC nearest", {"rounding": "nearest"}, {}),
    ("AAAC nearest + awq", {"rounding": "nearest"}, {"awq": True}),
    ("AAAC gptq, original inputs", {"rounding": "gptq"}, {"propagate": "original"}),
    (
        "AAAC gptq, original inputs, shared books",
        {"rounding": "gptq"},
        {"propagate": "original", "share_codebooks": True},
    ),
    ("AAAC gptq", {"rounding": "gptq"}, {"propagate": "quantized"}),
    ("AAAC gptq + awq", {"rounding": "gptq"}, {"propagate": "quantized", "awq": True}),
    ("AAAC gptq + fisher", {"rounding": "gptq"}, {"propagate": "quantized", "fisher": True}),
    ("AAAC gptq-thorough", {"rounding": "gptq-thorough"}, {"propagate": "quantized"}),
    ("AAAC gptq-thorough + fisher", {"rounding": "gptq-thorough"}, {"propagate": "quantized", "fisher": True}),
)
_THOROUGH = {"rounding": "gptq-thorough"}
_REST = ("choice", "sweeps", "descent", "fit", "annealing")
#: What each step adds: (name, fields of AAACConfig, arguments of calibrate_, steps left out, see `ours.STEPS`).
ABLATION: tuple[tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]], ...] = (
    ("two learned books", {"rounding": "nearest", "scale_search": False}, {}, ()),
    ("+ scale search", {"rounding": "nearest"}, {}, ()),
    ("+ feedback", _THOROUGH, {"propagate": "original"}, _REST),
    ("+ scales and books chosen in it", _THOROUGH, {"propagate": "original"}, _REST[1:]),
    ("+ descent inside blocks", _THOROUGH, {"propagate": "original"}, _REST[2:]),
    ("+ descent over blocks", _THOROUGH, {"propagate": "original"}, _REST[3:]),
    ("+ least-squares books and scales", _THOROUGH, {"propagate": "original"}, _REST[4:]),
    ("+ annealing", _THOROUGH, {"propagate": "original"}, ()),
    ("+ corrected for layers before", _THOROUGH, {"propagate": "quantized"}, ()),
    ("+ AWQ", _THOROUGH, {"propagate": "quantized", "awq": True}, ()),
    ("+ fisher instead of AWQ", _THOROUGH, {"propagate": "quantized", "fisher": True}, ()),
)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as shown.
        setting: format and group size, as in `SETTINGS`.
        script: the file of this folder that runs it.
        options: what the script is told.
        uses_data: whether it looks at calibration windows, and so may change with the seed.
        environment: name of the peers' environment it runs in; None: this one.
        flags: flags of its interpreter.
        note: what a reader of its figures must know.
        ablation: whether it is there to show what a step adds.
    """

    name: str
    setting: str
    script: str
    options: dict[str, Any] = field(hash=False)
    uses_data: bool
    environment: str | None = None
    flags: tuple[str, ...] = ()
    note: str = ""
    ablation: bool = False

    @property
    def key(self) -> str:
        """The name as `--methods` spells it."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def ours(self) -> bool:
        """Whether it is one of this package."""
        return self.environment is None


def our_methods(settings: Iterable[str]) -> list[Method]:
    """All lines of `OURS` in the given settings."""
    methods = []
    for setting in settings:
        format_name, group_size, grid = SETTINGS[setting]
        for name, fields, calibrate in OURS:
            config = {"format": format_name, "group_size": group_size, **fields}
            if config.get("codebooks") == GRID:
                config["codebooks"] = grid
            options = {"config": config, "calibrate": calibrate}
            methods.append(Method(name, setting, "ours.py", options, uses_data=calibrate is not None))
    return methods


def ablation_methods(settings: Iterable[str]) -> list[Method]:
    """All lines of `ABLATION` in the given settings."""
    methods = []
    for setting in settings:
        format_name, group_size, _ = SETTINGS[setting]
        for name, fields, calibrate, without in ABLATION:
            config = {"format": format_name, "group_size": group_size, **fields}
            options = {"config": config, "calibrate": calibrate, "without": list(without)}
            methods.append(Method(name, setting, "ours.py", options, uses_data=True, ablation=True))
    return methods


def choose(methods: Iterable[Method], patterns: Iterable[str]) -> list[Method]:
    """The methods that any pattern selects: "all" (without the ablation), "ours", "peers", "ablation", or a key with
    wildcards such as "aaac*".

    Raises:
        ValueError: a pattern that selects nothing.
    """
    methods = list(methods)
    regular, chosen = [method for method in methods if not method.ablation], []
    groups = {
        "all": regular,
        "ours": [method for method in regular if method.ours],
        "peers": [method for method in regular if not method.ours],
        "ablation": [method for method in methods if method.ablation],
    }
    for pattern in patterns:
        found = groups.get(pattern) or [m for m in regular if fnmatch(m.key, pattern.lower())]
        if not found:
            known = ", ".join(sorted({m.key for m in regular}))
            raise ValueError(f"no method matches {pattern!r}; use all, ours, peers, ablation or one of: {known}")
        chosen += found
    return [method for method in methods if method in chosen]


def with_baselines(chosen: list[Method]) -> list[Method]:
    """The chosen methods after the round-to-nearest that they are compared with, which may be chosen already."""
    settings = {method.setting for method in chosen if method.ours} | {COMMON}
    baselines = [m for m in our_methods(SETTINGS) if m.name == RTN and m.setting in settings]
    return baselines + [method for method in chosen if method not in baselines]
