"""The charts of `overdrive bench`: bars, or lines over sizes."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from overdrive.bench.outcome import Outcome
from overdrive.cli.bench_report import View, caption, cell
from overdrive.cli.report import BLUE, ORANGE

GREY = "#8a8a8a"
BASELINES = ("eager", "torch.mm", "copy")
FLOOR_STYLES = {"floor": "--", "floor FP8": ":"}

Row = dict[str, Any]


def draw(view: View, outcome: Outcome, about: dict[str, Any], path: Path) -> None:
    """Save the chart of a command as a PNG."""
    from matplotlib.figure import Figure  # a third of a second that --help need not wait for

    axis = about["arguments"].get("scale")
    figure = Figure(figsize=(11, 5.2 if axis else 1.8 + 0.3 * len(outcome.rows)), layout="constrained")
    figure.suptitle(f"{view.title}\n{textwrap.fill(caption(about), 150)}", fontsize=9)
    if axis:
        lines(view, outcome.rows, axis, figure)
    else:
        bars(view, outcome.rows, figure)
    figure.savefig(path, dpi=150, format="png")


def bars(view: View, rows: list[Row], figure: Any) -> None:
    """A bar a row, a panel a key; floors are lines across."""
    shown = [row for row in rows if row["variant"] not in FLOOR_STYLES]
    names = [f"{row['m']}x{row['n']}x{row['k']} {row['variant']}" if "m" in row else row["variant"] for row in shown]
    colors = [color_of(row) for row in shown]
    panels = figure.subplots(1, len(view.bars), sharey=True, squeeze=False)[0]
    for axes, (key, unit) in zip(panels, view.bars.items()):
        values = [row.get(key) or 0.0 for row in shown]
        spreads = [row.get(f"spread_{key}", 0.0) / 2 for row in shown]
        drawn = axes.barh(names, values, color=colors, xerr=spreads if any(spreads) else None, error_kw={"capsize": 2})
        shares = [f"  ({row['ratio']:.2f})" if row.get("ratio") else "" for row in shown]
        labels = [cell(row.get(key), view.form(key)) + share for row, share in zip(shown, shares)]
        axes.bar_label(drawn, labels, padding=4, fontsize=8)
        axes.set_xlabel(unit)
        axes.set_xlim(0, max(values) * 1.25)
        axes.margins(y=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        floors = [row for row in rows if row["variant"] in FLOOR_STYLES and key in row]
        for row in floors:
            label = f"{row['variant']}: {cell(row[key], view.form(key))} {unit}"
            axes.axvline(row[key], color="black", linestyle=FLOOR_STYLES[row["variant"]], linewidth=1, label=label)
        if floors:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    panels[0].invert_yaxis()


def color_of(row: Row) -> str:
    """overdrive's own, or the chosen one, stands out; so do competitors against the baseline."""
    if row["variant"] in BASELINES or row.get("chosen") is False:
        return GREY
    return ORANGE if row["variant"].startswith(("torch", "TE")) else BLUE


def lines(view: View, rows: list[Row], axis: str, figure: Any) -> None:
    """A line a variant over the axis, a panel a key."""
    points = sorted({row[axis] for row in rows})
    panels = figure.subplots(1, len(view.lines), squeeze=False)[0]
    for axes, (key, unit) in zip(panels, view.lines.items()):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            own = [(row[axis], row[key]) for row in rows if row["variant"] == variant and row.get(key) is not None]
            look: dict[str, Any] = {"marker": "o", "markersize": 4}
            if variant in FLOOR_STYLES:
                look = {"color": "black", "linestyle": FLOOR_STYLES[variant]}
            if own:
                axes.plot(*zip(*own), label=variant, linewidth=1.3, **look)
        axes.set_xscale("log", base=2)
        axes.set_xticks(points, [str(point) for point in points])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(axis)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
