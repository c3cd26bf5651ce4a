"""What a calibration run was asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from aaac_ao.config import AAACConfig
from aaac_ao.fisher import Importance


@dataclass(frozen=True)
class Options:
    """How `calibrate_` works; see there for the fields."""

    config: AAACConfig
    propagate: str
    awq: bool = False
    share_codebooks: bool = False
    fisher: bool = False
    importance: Importance = field(default_factory=Importance)

    @classmethod
    def of(
        cls, config: AAACConfig, propagate: str | None, awq: bool, share_codebooks: bool, fisher: bool = False
    ) -> Options:
        """The options, with `propagate` chosen by the rounding where it is None.

        Raises:
            ValueError: an unknown `propagate`, or `fisher` with what cannot use it.
        """
        if propagate not in (None, "quantized", "original"):
            raise ValueError(f"propagate must be 'quantized' or 'original', got {propagate!r}")
        if fisher and config.rounding == "nearest":
            raise ValueError("fisher=True needs rounding 'gptq', 'gptq-thorough' or 'auto', got 'nearest'")
        if fisher and awq:
            raise ValueError("fisher=True and awq=True do not go together: AWQ changes the outputs that were weighed")
        by_rounding = "original" if config.rounding == "nearest" else "quantized"
        return cls(config, by_rounding if propagate is None else propagate, awq, share_codebooks, fisher)

    def settings(self) -> dict[str, Any]:
        """All that was asked for, as a flat dict of plain values."""
        own = {name: getattr(self, name) for name in ("propagate", "awq", "share_codebooks", "fisher")}
        return {**dataclasses.asdict(self.config), "step": None, **own}

    @property
    def full(self) -> bool:
        """Whether full Hessians are gathered."""
        return self.config.rounding != "nearest"
