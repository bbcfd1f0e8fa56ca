"""``results.md`` of a run on a GPU, and the line printed for each of its points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import report, store
from benchmarks.peers import is_jrnn
from benchmarks.report import NOTHING, median, number

ABOUT = {
    "grid": "One layer, one direction.",
    "two layers": "Two layers.",
    "five layers": "Five bidirectional layers, lengths evenly from T/4 to T; the floor counts valid steps only.",
    "two directions": "Both directions, outputs concatenated.",
    "ragged": "Lengths evenly from T/4 to T; the floor counts valid steps only.",
    "own cell": "The LSTM written by a user, as an `AffineCell` of eight lines, beside the built-in one.",
    "one step": "One call for each time step, its state fed back, in microseconds; `empty` is what dispatch costs.",
    "settings": "The hoisted schedule under settings of XLA's, each in a process of its own.",
}
READING = (
    "Milliseconds of one call, medians of interleaved repetitions; each call waits for its result. *floor* is the "
    "longer of two times, that of the matrix products at the measured rate in their arithmetic and that of inputs, "
    "outputs and parameters at the measured copy bandwidth (bytes read and written), and its share of the fastest "
    "jrnn's time. *faster* is the time of the fastest other library over that of the fastest jrnn, in bold where jrnn "
    "loses. In `tf32` everybody may round factors of products to TF32, which JAX does by default; in `exact` nobody "
    "does. Who is not in a row did not serve it, or see the notes.\n"
)


def write(folder: Path, content: dict[str, Any]) -> None:
    """Writes all that is derived from the results."""
    store.replace(folder / "results.md", markdown(content))


def best(entry: dict[str, Any], ours: bool) -> tuple[str, float] | None:
    """The fastest of jrnn's schedules, or of the others, and its milliseconds."""
    found = [(median(entry, name), name) for name in entry["results"] if _is_ours(entry, name) == ours]
    timed = [(ms, name) for ms, name in found if ms is not None and name != "empty"]
    return min(timed)[::-1] if timed else None


def _is_ours(entry: dict[str, Any], name: str) -> bool:
    return is_jrnn(name) or entry["point"]["section"] == "settings"


def line(entry: dict[str, Any]) -> str:
    """A point in a few words."""
    words = []
    for ours in (True, False):
        found = best(entry, ours)
        words += [f"{found[0]} {number(found[1])} ms"] if found else []
    words += [f"{name} FAILED" for name, result in entry["results"].items() if "failed" in result]
    words += [f"{name} DISAGREES" for name, result in entry["results"].items() if "disagrees" in result]
    return ", ".join(words)


def markdown(content: dict[str, Any]) -> str:
    entries = list(content["points"].values())
    parts = ["# Benchmark results on a GPU\n", *_conditions(content), READING]
    for section, about in ABOUT.items():
        for cell, title in report.TITLES.items():
            found = [e for e in entries if (e["point"]["section"], e["point"]["cell"]) == (section, cell)]
            if found:
                parts += [f"## {title}{'' if section == 'grid' else f': {section}'}\n", about + "\n", _table(found)]
                parts += [_refusals(found), report._notes(found), report._details(found)]
    parts += ["## How each is used\n"]
    for name, about in content["peers"].items():
        parts.append(f"- **{name}** {about.get('version', '')}: {about.get('form', 'not installed')}")
    return "\n".join(part for part in parts if part) + "\n"


def _conditions(content: dict[str, Any]) -> list[str]:
    lines = []
    for name, environment in content["environments"].items():
        entries = [entry for entry in content["points"].values() if entry["environment"] == name]
        hardware, settings = environment["hardware"], environment["settings"]
        gpu = hardware.get("gpu")
        device = ", ".join(f"{key} {value}" for key, value in gpu.items()) if gpu else "no GPU: a trial on the CPU"
        rates = {entry["rate_of"]: entry["matmul_flops_per_second"] for entry in entries}
        words = [f"{rate / 1e12:.3g} TFLOP/s {which}" for which, rate in rates.items()]
        words += [f"copies at {entries[0]['copy_bytes_per_second'] / 1e12:.3g} TB/s"] if entries else []
        versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
        dates = sorted(entry["date"] for entry in entries)
        lines += [
            f"{device}; beside it {hardware['cpu']}, {hardware['cores']} cores, {hardware['system']}.  ",
            f"Matrix products: {', '.join(words)}.  ",
            f"{versions}.  ",
            f"{len(entries)} points, {dates[0] if dates else NOTHING} to {dates[-1] if dates else NOTHING}; up to "
            f"{settings['repeats']} repetitions or {settings['seconds']:g} s a point.\n",
        ]
    if len(content["environments"]) > 1:
        lines.append("**Measured in more than one environment**: run with `--fresh` to compare.\n")
    return lines


def _table(entries: list[dict[str, Any]]) -> str:
    scale = 1e3 if entries[0]["point"]["section"] == "one step" else 1.0
    names = list(dict.fromkeys(name for e in entries for name in e["results"] if median(e, name) is not None))
    rows = []
    for entry in entries:
        ours, other = best(entry, True), best(entry, False)
        cells = [None if median(entry, name) is None else scale * (median(entry, name) or 0.0) for name in names]
        row = [report.label(entry), *map(number, cells)]
        ratio = other[1] / ours[1] if ours and other else None
        words = NOTHING if ratio is None or other is None else f"{ratio:.2f}x {other[0]}"
        row += [words if ratio is None or ratio >= 1 else f"**{words}**"]
        row += [f"{entry['floor_ms']:.3g} ms" + (f", {100 * entry['floor_ms'] / ours[1]:.0f}%" if ours else "")]
        row += [NOTHING if ours is None else number(1e3 * ours[1] / entry["point"]["time"])]
        rows.append(row)
    return report.table(["(B, T, F, H), arithmetic", *names, "faster", "floor", "µs a step"], rows)


def _refusals(entries: list[dict[str, Any]]) -> str:
    """Why somebody is missing, once for each reason; not where it is the section that leaves them out."""
    found = {(name, r["refused"]): None for e in entries for name, r in e["results"].items() if "refused" in r}
    lines = []
    for name, reason in found:
        if "own section" in reason or "single step" in reason:
            continue
        # A refusal of `unroll` begins with the argument and the cell, and ends with advice.
        words = reason.split(": ", 2)[-1] if reason.startswith("backend:") else reason
        lines.append(f"{name} takes no part: {words.split('; pass backend=None')[0]}.")
    return "  \n".join(dict.fromkeys(lines)) + "\n" if lines else ""
