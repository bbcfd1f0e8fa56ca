"""``results.png``: milliseconds at every shape, one panel a cell, forward above forward and backward."""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.grid import GATES, SHAPES
from benchmarks.peers import PEERS

TITLES = {"lstm": "LSTM", "gru": "GRU", "elman": "Elman"}
ROWS = {"forward": "forward", "train": "forward + backward"}
# Colours that most colour-blind readers can tell apart, and a shape of its own for each.
STYLES = {
    "hand": ("#7f7f7f", "s"),
    "hand hoisted": ("#7f7f7f", "D"),
    "flax.linen": ("#0072b2", "o"),
    "flax.nnx": ("#56b4e9", "o"),
    "haiku": ("#009e73", "^"),
    "equinox": ("#e69f00", "v"),
    "keras": ("#cc79a7", "P"),
    "torch": ("#d55e00", "X"),
    "jrnn": ("#000000", "*"),
    "jrnn hoisted": ("#b2182b", "*"),
}
OURS = ("jrnn", "jrnn hoisted")


def write(path: Path, content: dict[str, Any]) -> bool:
    """Draws the picture; False where there is no matplotlib, or nothing to draw."""
    grid = [entry for entry in content["points"].values() if entry["point"]["section"] == "grid"]
    if not grid or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    cells = [cell for cell in GATES if any(entry["point"]["cell"] == cell for entry in grid)]
    works = [work for work in ROWS if any(entry["point"]["work"] == work for entry in grid)]
    figure = Figure(figsize=(4.6 * len(cells) + 0.6, 3.7 * len(works) + 1.0), layout="constrained", dpi=130)
    axes = figure.subplots(len(works), len(cells), squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for i, work in enumerate(works):
        for j, cell in enumerate(cells):
            entries = [e for e in grid if e["point"]["cell"] == cell and e["point"]["work"] == work]
            handles |= _panel(axes[i][j], entries)
            axes[i][j].set_title(f"{TITLES[cell]}, {ROWS[work]}")
            axes[i][j].set_visible(bool(entries))
        next(ax for ax in axes[i] if ax.get_visible()).set_ylabel("milliseconds a call, log scale")
        shown = [e for e in grid if e["point"]["work"] == work]
        _limits(axes[i], shown)
        _ticks(axes[i])
    figure.suptitle(_about(content, grid), fontsize=9)
    order = [name for name in [*PEERS, "floor"] if name in handles]
    columns = min(len(order), 4 * len(cells))
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, metadata={"Software": None})
    os.replace(temporary, path)
    return True


def _about(content: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """The hardware and the versions that matter, in one line for each environment."""
    lines = []
    for name in sorted({entry["environment"] for entry in entries}):
        hardware, versions = (content["environments"][name][key] for key in ("hardware", "versions"))
        packages = ", ".join(f"{package} {versions[package]}" for package in ("jax", "torch") if package in versions)
        lines.append(f"{hardware['cpu']}, {hardware['cores']} cores, float32, medians; {packages}")
    return "\n".join(lines)


def _limits(row: Any, entries: list[dict[str, Any]]) -> None:
    """Leaves out floors far below everything that was measured, which would squeeze the rest."""
    low, high = row[0].get_ylim()
    middles = [
        statistics.median(r["samples_ms"]) for e in entries for r in e["results"].values() if r.get("samples_ms")
    ]
    if middles:
        row[0].set_ylim(max(low, 0.35 * min(middles)), high)


def _ticks(row: Any) -> None:
    """Plain numbers, and as many as there is room for: the panels of a row share their axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = row[0].get_ylim()
    decades = math.log10(high / low)
    subs = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    for ax in row:
        ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="y", labelleft=True)


def _panel(ax: Any, entries: list[dict[str, Any]]) -> dict[str, Any]:
    order = {shape: index for index, shape in enumerate(SHAPES)}
    shape = lambda entry: tuple(entry["point"][name] for name in ("batch", "time", "features", "hidden"))
    entries = sorted(entries, key=lambda entry: (order.get(shape(entry), len(order)), shape(entry)))
    handles: dict[str, Any] = {}
    for index, entry in enumerate(entries):
        (bar,) = ax.plot([index - 0.38, index + 0.38], [entry["floor_ms"]] * 2, color="#bbbbbb", linewidth=3, zorder=1)
        handles["floor"] = bar
    for place, (name, (colour, marker)) in enumerate(STYLES.items()):
        where, middle = [], []
        for index, entry in enumerate(entries):
            samples = entry["results"].get(name, {}).get("samples_ms")
            if samples:
                # Side by side, so that close ones stay apart; jrnn's forms in the middle.
                offset = 0.0 if name in OURS else (place - (len(STYLES) - len(OURS) - 1) / 2) * 0.075
                where.append(index + offset)
                middle.append(statistics.median(samples))
        if where:
            big = name in OURS
            style = {"color": colour, "marker": marker, "s": 150 if big else 34, "zorder": 4 if big else 3}
            handles[name] = ax.scatter(where, middle, **style, facecolor="none" if name == "hand hoisted" else colour)
    ax.set_yscale("log")
    ax.set_xticks(range(len(entries)), ["B {}\nT {}\nF {}\nH {}".format(*shape(e)) for e in entries], fontsize=8)
    ax.set_xlim(-0.6, max(0.6, len(entries) - 0.4))
    for edge in range(1, len(entries)):
        ax.axvline(edge - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    ax.grid(axis="y", which="major", color="#e4e4e4")
    ax.set_axisbelow(True)
    return handles
