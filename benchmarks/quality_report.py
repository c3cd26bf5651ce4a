"""Tables and plots of the rows that `benchmarks.quality` collects."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from aaac_ao.evaluate import gap_recovered
from benchmarks.methods import COMMON, RTN

HEADER = [
    "format",
    "method",
    "bits/weight",
    "perplexity",
    "KL to original",
    "KL gap",
    "ppl gap",
    f"KL gap, {COMMON}",
    f"ppl gap, {COMMON}",
    "seconds",
    "CPU s",
    "peak MB",
]
LEGEND = (
    f"Gaps: the share of round-to-nearest's loss that a method wins back; first against RTN of the same format, then "
    f"of {COMMON}. Bits: all that is stored for the quantised layers. Seconds: calibration and encoding; CPU s: the "
    "same, summed over threads. Peak MB: how far the method's own process grew above the loaded model (RSS high-water "
    "mark)."
)


def averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one model with the seeds of a method averaged: `kl_sd` is their standard deviation (None for one)."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row.get("setting", "")), []).append(row)
    result = []
    for group in groups.values():
        good = [row for row in group if "error" not in row]
        row = dict(good[0] if good else group[0])
        for key in ("perplexity", "kl", "seconds", "cpu_seconds", "peak_mb", "bits"):
            if key in row:
                row[key] = statistics.fmean(r[key] for r in good)
        row["kl_sd"] = statistics.stdev(r["kl"] for r in good) if len(good) > 1 else None
        result.append(row)
    return result


def with_gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averaged rows of one model with what they win back of the loss of both round-to-nearest baselines."""
    original = next(row for row in rows if row["method"] == "original")
    baselines = {row["setting"]: row for row in rows if row["method"] == RTN and "kl" in row}
    for row in rows:
        if "kl" not in row:
            continue
        for suffix, setting in (("", row["setting"] if row["ours"] else None), ("_common", COMMON)):
            baseline = baselines.get(setting)
            if baseline is not None:
                row[f"kl_gap{suffix}"] = gap_recovered(row["kl"], baseline["kl"], 0.0)
                row[f"ppl_gap{suffix}"] = gap_recovered(
                    row["perplexity"], baseline["perplexity"], original["perplexity"]
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one model as a Markdown table, with its legend and the notes of its methods."""
    lines = []
    notes: dict[str, None] = {}
    for row in with_gaps(averaged(rows)):
        if row["method"] == "original":
            lines.append(["", "original", "16.000", f"{row['perplexity']:.3f}", "0", *[""] * 7])
            continue
        title = f"{row['method']} {row['setting']}"
        for note in filter(None, [row.get("note"), *row.get("notes", [])]):
            notes[f"- {row['method']}: {note}"] = None
        if "error" in row:
            notes[f"- {title}: not available: {row['error']}"] = None
            lines.append([row["setting"], row["method"], "not available", *[""] * 9])
            continue
        spread = "" if row["kl_sd"] is None else f" ± {row['kl_sd']:.5f}"
        lines.append(
            [
                row["setting"],
                row["method"],
                f"{row['bits']:.3f}",
                f"{row['perplexity']:.3f}",
                f"{row['kl']:.5f}{spread}",
                *[_percent(row.get(key)) for key in ("kl_gap", "ppl_gap", "kl_gap_common", "ppl_gap_common")],
                f"{row['seconds']:.1f}",
                f"{row['cpu_seconds']:.1f}" if "cpu_seconds" in row else "",
                f"{row['peak_mb']:.0f}",
            ]
        )
    text = tabulate(lines, HEADER, tablefmt="github", disable_numparse=True)
    return "\n".join([text, "", LEGEND, "", *notes, *_versions(rows)])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _versions(rows: list[dict[str, Any]]) -> list[str]:
    found = {f"{name} {version}" for row in rows for name, version in row.get("versions", {}).items()}
    return ["", f"Versions: {', '.join(sorted(found))}."] if found else []


def require_matplotlib() -> None:
    """Stop with what to do when there is no matplotlib, before hours of work."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("error: --plot needs matplotlib; install the extra: pip install 'aaac-ao[bench]'")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against bits per weight, one panel per model: our methods as lines over formats, peers as named points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(9 * len(models), 6.5), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        _draw(panel, [row for row in averaged([r for r in rows if r["model"] == model]) if "kl" in row])
        panel.set(title=model, xlabel="stored bits per weight", ylabel="KL to the original (nats per token)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(panel: Any, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys((row["method"], row["ours"]) for row in rows))
    markers = "ov^<>sPX*dDhp8"
    for index, (name, ours) in enumerate(names):
        points = sorted((row["bits"], row["kl"], row["setting"]) for row in rows if row["method"] == name)
        int4 = [p for p in points if not p[2].startswith("nvfp4")]
        nvfp4 = [p for p in points if p[2].startswith("nvfp4")]
        style = {"marker": markers[index % len(markers)], "color": f"C{index % 10}", "linewidth": 1}
        label = name
        for part, fill in ((int4, "full" if ours else "none"), (nvfp4, "left" if ours else "right")):
            if part:
                line = "-" if ours else ":"
                panel.plot([p[0] for p in part], [p[1] for p in part], line, label=label, fillstyle=fill, **style)
                label = None  # one entry in the legend per method
    panel.set_yscale("log")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=7, ncols=2, title="full: ours, open: peers, half: nvfp4", title_fontsize=7)
