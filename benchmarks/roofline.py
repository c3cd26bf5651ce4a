"""A roofline: what a run of `benchmarks.linear` reached, under what memory and arithmetic allow."""

from __future__ import annotations

import pathlib


def points(rows: list[dict]) -> list[tuple[float, float]]:
    """(operations per byte, operations per second) of each row."""
    found = []
    for row in rows:
        operations = 2 * row["M"] * row["N"] * row["K"]
        seconds = row["us"] * 1e-6
        found.append((operations / (row["GB_per_s"] * 1e9 * seconds), operations / seconds))
    return found


def draw(report: dict, path: pathlib.Path) -> None:
    """One point for each row of the last bandwidth's rows; the roof is that bandwidth and the fastest row.

    Raises:
        ValueError: there are no rows.
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads, bandwidth = list(report["bandwidth"].items())[-1]
    rows = [row for row in report["rows"] if row.get("threads", 0) == threads]
    if not rows:
        raise ValueError("nothing was measured: there is no roofline to draw")
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = points([row for row in rows if row["variant"] == variant])
        axes.plot(*zip(*mine, strict=True), "o" if variant.startswith("AAAC") else ".", alpha=0.6, label=variant)
    everything = points(rows)
    top, last = max(rate for _, rate in everything), max(intensity for intensity, _ in everything)
    first = min(intensity for intensity, _ in everything)
    roof = [first, max(first, top / bandwidth), max(last, top / bandwidth)]
    axes.plot(roof, [min(top, bandwidth * intensity) for intensity in roof], "k--", label="roof")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.set(title=report["environment"]["device"])
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
