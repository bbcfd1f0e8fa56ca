"""``results.md`` and the line printed for each point, from the content of ``results.json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import plot, store
from benchmarks.grid import DROP_IN, GATES, STEPS, WORK, Point
from benchmarks.peers import PEERS, is_jrnn
from benchmarks.peers.base import PRODUCT

NOTHING = "-"  # in a table, where there is no number
TITLES = {"lstm": "LSTM", "gru": "GRU", "elman": "Elman"}
SECTIONS = {
    "grid": "",
    "two layers": "Two layers.",
    "two directions": "Both directions, outputs concatenated.",
    "ragged": "Lengths evenly from T/4 to T; the floor counts valid steps only.",
    "own cell": "The LSTM written by a user, as an `AffineCell` of eight lines, beside the built-in one.",
    STEPS: "Unchanged steps of other libraries, and one written by hand, in `jax.lax.scan` and in `jrnn.scan`, beside "
    "the built-in cell. *over lax.scan* is how many times as long they take in `jax.lax.scan` as in `jrnn.scan`, and "
    "*over built-in* how many times as long in `jrnn.scan` as the built-in cell: geometric means over the libraries.",
    DROP_IN: "Flax's own `RNN` (with resets, the class that wraps a cell in `nn.scan`) and jrnn's in its place, from "
    "the same variables: `OptimizedLSTMCell`, `LSTMCell` and `GRUCell` of linen and nnx. *over jrnn.flax* is how many "
    "times as long they take in Flax's as in jrnn's, the geometric mean over the cells, and *least* the least of them.",
    "bfloat16": "Inputs and products in bfloat16; the floor is still that of float32 products. CPUs that have no "
    "instructions for it emulate them, each library in its own way.",
    "one step": "One call for each time step, its state fed back. `empty` is a jitted function of the same arguments "
    "that does next to nothing: what dispatch costs.",
    "long": "jrnn alone: is time linear in T?",
    "memory": 'jrnn alone: `remat="sqrt"` beside keeping every residual.',
}


def write(folder: Path, content: dict[str, Any]) -> bool:
    """Writes all that is derived from the results; whether that includes a picture."""
    store.replace(folder / "results.md", markdown(content))
    return plot.write(folder / "results.png", content)


# The forms of jrnn that are compared with all others.
FORMS = ("jrnn", "jrnn hoisted")


# --- numbers -----------------------------------------------------------------------------------------------------


def median(entry: dict[str, Any], peer: str) -> float | None:
    """Milliseconds of one call, the median of a peer's repetitions; None where it has none."""
    samples = entry["results"].get(peer, {}).get("samples_ms")
    return statistics.median(samples) if samples else None


def best_other(entry: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest peer that is not jrnn, and its milliseconds."""
    found = {name: median(entry, name) for name in entry["results"] if not is_jrnn(name)}
    timed = {name: ms for name, ms in found.items() if ms is not None}
    return min(timed.items(), key=lambda item: item[1]) if timed else None


def floor_in_rounds(entry: dict[str, Any]) -> float | None:
    """Milliseconds of the products alone at the median rate of the same rounds; None where that was not measured."""
    ms = median(entry, "products")
    return None if ms is None else ms * entry["flops"] / (2.0 * PRODUCT**3)


def disturbed(content: dict[str, Any], points: Iterable[Point], least: float = 0.75) -> list[Point]:
    """Of some points those in whose rounds products ran below that share of their median rate over all."""
    times = {id: median(entry, "products") for id, entry in content["points"].items()}
    usual = statistics.median([ms for ms in times.values() if ms is not None] or [0.0])
    return [point for point in points if (times.get(point.id) or 0.0) > usual / least]


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def ratios(peer: str, ours: str, entries: Iterable[dict[str, Any]]) -> list[float]:
    """How many times the time of one of jrnn's forms a peer needs, at every point that both have."""
    pairs = [(median(entry, peer), median(entry, ours)) for entry in entries]
    return [theirs / mine for theirs, mine in pairs if theirs is not None and mine is not None]


def entries_of(content: dict[str, Any], section: str, cell: str | None = None, work: str | None = None) -> list[Any]:
    return [
        entry
        for entry in content["points"].values()
        if entry["point"]["section"] == section
        and cell in (None, entry["point"]["cell"])
        and work in (None, entry["point"]["work"])
    ]


# --- words -------------------------------------------------------------------------------------------------------


def number(value: float | None, unit: str = "") -> str:
    """Three digits that mean something."""
    if value is None:
        return NOTHING
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}{unit}"


def size(count: float | None) -> str:
    if not count:
        return NOTHING if count is None else "0"
    return number(count / 2**20, " MiB") if count >= 2**20 else number(count / 2**10, " KiB")


def table(header: list[str], rows: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows]) + "\n"


def line(content: dict[str, Any], point: Point) -> str:
    """A point in a few words."""
    entry = content["points"][point.id]
    ours, best = median(entry, "jrnn"), best_other(entry)
    words = [f"jrnn {number(ours)} ms"]
    if ours is not None and best is not None:
        words.append(f"{best[0]} {number(best[1])} ms ({best[1] / ours:.2f}x)")
    for name, result in entry["results"].items():
        if "failed" in result or "disagrees" in result:
            words.append(f"{name} {'FAILED' if 'failed' in result else 'DISAGREES'}")
    return ", ".join(words)


def label(entry: dict[str, Any]) -> str:
    point = Point.from_json(entry["point"])
    shape = ", ".join(map(str, point.shape))
    words = f"{WORK[point.work]} ({shape})"
    return f"{words}, {point.arithmetic}" if point.precision else words


def faster(entry: dict[str, Any], form: str = "jrnn") -> str:
    """One of jrnn's forms beside the fastest other: bold where it loses."""
    ours, best = median(entry, form), best_other(entry)
    if ours is None or best is None:
        return NOTHING
    ratio = best[1] / ours
    return f"{ratio:.2f}x {best[0]}" if ratio >= 1 else f"**{ratio:.2f}x {best[0]}**"


# --- the document ------------------------------------------------------------------------------------------------


def markdown(content: dict[str, Any]) -> str:
    parts = ["# Benchmark results\n", _conditions(content), _summary(content)]
    for section, about in SECTIONS.items():
        for cell in GATES:
            entries = entries_of(content, section, cell)
            if entries:
                title = TITLES[cell] if section == "grid" else f"{TITLES[cell]}: {section}"
                parts += [f"## {title}\n", about + "\n" if about else "", _section(entries, section)]
    parts.append(_peers(content))
    return "\n".join(part for part in parts if part)


def _conditions(content: dict[str, Any]) -> str:
    used = {entry["environment"] for entry in content["points"].values()}
    lines = []
    for name in used or content["environments"]:
        environment = content["environments"][name]
        points = [entry for entry in content["points"].values() if entry["environment"] == name]
        hardware, settings = environment["hardware"], environment["settings"]
        flags = ", ".join(flag for flag, present in hardware["flags"].items() if present)
        rates = sorted({round(entry["matmul_flops_per_second"] / 1e9) for entry in points})
        versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
        dates = sorted(entry["date"] for entry in points)
        lines += [
            f"{hardware['cpu']}, {hardware['cores']} cores ({flags}), {hardware['system']}; "
            f"float32 matrix products at {' to '.join(map(str, rates[:1] + rates[1:][-1:]))} GFLOP/s.  ",
            f"{versions}.  ",
            f"{len(points)} points, {dates[0] if dates else NOTHING} to {dates[-1] if dates else NOTHING}; up to "
            f"{settings['repeats']} repetitions or {settings['seconds']:g} s a point.\n",
        ]
    again = sum(entry.get("measured", 1) > 1 for entry in content["points"].values())
    if again:
        lines.append(
            f"{again} of the points were measured again, since products ran slower in their rounds than usual.\n"
        )
    if len(used) > 1:
        lines.append("**The points were measured in more than one environment**: run with `--fresh` to compare.\n")
    lines.append(
        "Milliseconds of one call, medians of interleaved repetitions. *faster* is the time of the fastest other "
        "library over jrnn's: above 1 jrnn is faster, below 1 (bold) it loses. *floor* is the time of the matrix "
        "products alone at the best rate ever measured here, and its share of jrnn's median; *in rounds* is the "
        "same at the median rate of products that were timed in the same rounds. † see the notes under the table.\n"
    )
    return "\n".join(lines)


def _summary(content: dict[str, Any]) -> str:
    parts = [_compared(content, ours) for ours in FORMS]
    head = "## Summary\n\nGeometric means over the shapes of the tables below.\n\n"
    return head + "\n".join(filter(None, parts)) if any(parts) else ""


def _compared(content: dict[str, Any], ours: str) -> str:
    """One of jrnn's forms beside all others, and every point that it loses."""
    columns = [
        (cell, work) for cell in GATES for work in ("forward", "train") if entries_of(content, "grid", cell, work)
    ]
    columns_of = {pair: entries_of(content, "grid", *pair) for pair in columns}
    everything = [entry for entries in columns_of.values() for entry in entries]
    rows = []
    for name in PEERS:
        if name == ours or (is_jrnn(name) and name not in ("jrnn", "jrnn reference")):
            continue
        found = ratios(name, ours, everything)
        if found:
            means = [geometric_mean(ratios(name, ours, entries)) for entries in columns_of.values()]
            wins = sum(ratio >= 1 for ratio in found)
            cells = [number(mean, "x") for mean in [*means, geometric_mean(found)]]
            rows.append([name, *cells, number(min(found), "x"), f"{wins} of {len(found)}"])
    if not rows:
        return ""
    losses = []
    for entry in content["points"].values():
        mine, best = median(entry, ours), best_other(entry)
        if mine is not None and best is not None and best[1] < mine:
            losses.append(
                (best[1] / mine, f"{entry['point']['section']}, {entry['point']['cell']}, {label(entry)}: ", best)
            )
    titles = [f"{TITLES[cell]} {'fwd' if work == 'forward' else 'fwd+bwd'}" for cell, work in columns]
    header = [f"time of … over {ours}'s", *titles, "all", "worst", f"{ours} faster"]
    lost = "\n".join(f"- {ratio:.2f}x {text}{best[0]}" for ratio, text, best in sorted(losses)) or "None."
    return f"{table(header, rows)}\n" + (
        f"Points that {ours} loses to the fastest other library, of all sections:\n\n{lost}\n"
    )


def _section(entries: list[dict[str, Any]], section: str) -> str:
    present = [name for name in PEERS if any(median(entry, name) is not None for entry in entries)]
    present = [name for name in present if name != "products"]
    micro = section == "one step"
    scale = 1e3 if micro else 1.0
    header = ["(B, T, F, H), µs" if micro else "(B, T, F, H)", *present]
    if "jrnn hoisted" in present:
        extra = {"grid": ["faster", "hoisted faster", "floor", "in rounds", "hoisted of floor"]}
        extra |= {"own cell": ["own / built-in", "hoisted own / built-in"]}
    else:
        extra = {"grid": ["faster", "floor", "in rounds", "µs a step"], "own cell": ["own / built-in"]}
    extra |= {STEPS: ["over lax.scan", "over built-in"]}
    extra |= {DROP_IN: ["over jrnn.flax", "least", "floor"]}
    extra |= {"long": ["µs a step"], "one step": ["faster"]}
    extra |= {"memory": ["remat / without", "temporaries with remat", "without"]}
    added = extra.get(section, ["faster", "floor"])
    rows = []
    for entry in entries:
        point, ours = Point.from_json(entry["point"]), median(entry, "jrnn")
        values = []
        for name in present:
            ms = median(entry, name)
            mark = "†" if entry["results"].get(name, {}).get("note") else ""
            values.append(number(None if ms is None else scale * ms) + (mark if ms is not None else ""))
        beside = floor_in_rounds(entry)
        names = ("own cell", "hoisted", "own cell hoisted", "remat")
        own, hoisted, own_hoisted, remat = (median(entry, f"jrnn {name}") for name in names)
        what = {
            "faster": faster(entry),
            "hoisted faster": faster(entry, "jrnn hoisted"),
            "hoisted of floor": NOTHING if hoisted is None else f"{100 * entry['floor_ms'] / hoisted:.0f}%",
            "hoisted own / built-in": NOTHING if None in (hoisted, own_hoisted) else f"{own_hoisted / hoisted:.2f}",
            "floor": NOTHING if ours is None else f"{entry['floor_ms']:.3g} ms, {100 * entry['floor_ms'] / ours:.0f}%",
            "in rounds": NOTHING if None in (ours, beside) else f"{100 * beside / ours:.0f}%",
            "µs a step": NOTHING if ours is None else number(1e3 * ours / point.time),
            "without": size(entry["results"].get("jrnn", {}).get("temp_bytes")),
            "temporaries with remat": size(entry["results"].get("jrnn remat", {}).get("temp_bytes")),
            "remat / without": NOTHING if None in (ours, remat) else f"{remat / ours:.2f}",
            "over lax.scan": number(geometric_mean(_in_scans(entry, "lax.scan")), "x"),
            "over built-in": number(geometric_mean(_in_scans(entry, None)), "x"),
            "over jrnn.flax": number(geometric_mean(_in_place(entry)), "x"),
            "least": number(min(_in_place(entry), default=None), "x"),
            "own / built-in": NOTHING if own is None or ours is None else f"{own / ours:.2f}",
        }
        rows.append([label(entry), *values, *(what[name] for name in added)])
    return f"{table(header + added, rows)}\n{_notes(entries)}{_details(entries)}"


def _in_scans(entry: dict[str, Any], other: str | None) -> list[float]:
    """Of steps in `jrnn.scan`, the time of another scan over theirs; or theirs over that of the built-in cell."""
    found = []
    for name in entry["results"]:
        ours = median(entry, name) if name.endswith(" in jrnn.scan") else None
        theirs = median(entry, name.replace("jrnn.scan", other) if other else "jrnn")
        if ours is not None and theirs is not None:
            found.append(theirs / ours if other else ours / theirs)
    return found


def _in_place(entry: dict[str, Any]) -> list[float]:
    """Of each cell, the time on Flax over that on jrnn."""
    names = [name for name in entry["results"] if name.endswith(" on jrnn")]
    pairs = [(median(entry, name.replace(" on jrnn", " on flax")), median(entry, name)) for name in names]
    return [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]


def _notes(entries: list[dict[str, Any]]) -> str:
    notes: dict[str, None] = {}
    for entry in entries:
        for name, result in entry["results"].items():
            if result.get("note"):
                notes[f"† {name}: {result['note']}."] = None
            if "failed" in result:
                notes[f"**{name} failed** at {label(entry)}: {result['failed']}"] = None
            if "disagrees" in result:
                notes[f"**{name} disagrees** at {label(entry)}, and was not timed: {result['disagrees']}"] = None
    return "  \n".join(notes) + "\n\n" if notes else ""


def _details(entries: list[dict[str, Any]]) -> str:
    header = ["work (B, T, F, H)", "peer", "min", "q1", "median", "q3", "µs a step", "share of floor", "over the best"]
    header += ["temporaries", "trace", "compile", "largest error"]
    rows = []
    for entry in entries:
        point, best = Point.from_json(entry["point"]), best_other(entry)
        for name, result in entry["results"].items():
            samples = result.get("samples_ms")
            if not samples or name == "products":
                continue
            middle = statistics.median(samples)
            q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [middle] * 3
            worst = max(result["errors"].values(), default=None)
            row = [label(entry), name, *(number(ms) for ms in (min(samples), q1, middle, q3))]
            row += [number(1e3 * middle / point.time), f"{100 * entry['floor_ms'] / middle:.0f}%"]
            row += [NOTHING if best is None else f"{middle / best[1]:.2f}", size(result.get("temp_bytes"))]
            row += [number(result.get("trace_ms")), number(result.get("compile_ms"))]
            rows.append([*row, NOTHING if worst is None else f"{worst:.0e}"])
    body = table(header, rows)
    summary = "Each peer: spread, memory, tracing and compilation (milliseconds)"
    return f"<details><summary>{summary}</summary>\n\n{body}\n</details>\n"


def _peers(content: dict[str, Any]) -> str:
    lines = ["## How each is used\n"]
    for name in PEERS:
        about = content["peers"].get(name)
        if about is not None:
            version = about.get("version", "")
            lines.append(f"- **{name}** {version}: {about.get('form', 'not installed')}")
    return "\n".join(lines) + "\n"
