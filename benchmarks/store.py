"""``results.json``: every finished point, what it was measured on, and which points are still to do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.grid import Point

FORMAT = 1


class Store:
    """The results of a folder, written again, whole, after each point.

    A point counts as finished where it was measured in the same environment (hardware, versions, settings; see
    `benchmarks.machine.environment`) with all of the peers that are asked for.
    """

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.path = folder / "results.json"
        self.fingerprint = machine.fingerprint(environment)
        self.content: dict[str, Any] = {"format": FORMAT, "environments": {}, "peers": {}, "points": {}}
        if self.path.exists():
            content = json.loads(self.path.read_text())
            if content.get("format") == FORMAT:
                self.content = content
        self.content["environments"][self.fingerprint] = environment

    def finished(self, point: Point, names: list[str]) -> bool:
        """Whether there is nothing left to measure at a point."""
        known = self.content["points"].get(point.id)
        wanted = [name for name in names if point.peers is None or name in point.peers]
        return (
            known is not None
            and known["environment"] == self.fingerprint
            and known["point"] == json.loads(json.dumps(point.to_json()))
            and all(name in known["results"] and "failed" not in known["results"][name] for name in wanted)
        )

    def measured(self, point: Point) -> int:
        """How often a point was measured in this environment."""
        known = self.content["points"].get(point.id, {})
        return known.get("measured", 1) if known.get("environment") == self.fingerprint else 0

    def forget(self, points: Iterable[Point] | None = None) -> None:
        """Drops what is known of some points, or of all; the file changes when the first new result is there."""
        names = list(self.content["points"]) if points is None else [point.id for point in points]
        for name in names:
            self.content["points"].pop(name, None)

    def add(
        self, point: Point, results: dict[str, Any], flops_per_second: float, load: float, steps: int, **more: Any
    ) -> None:
        """Keeps a point's results. ``steps`` are its valid steps, of all sequences together.

        ``more`` is kept beside them: ``rate_of``, where several rates are measured, says which one this is, and
        ``bytes`` with ``copy_bytes_per_second`` bound the floor by memory as well.
        """
        self.content["points"][point.id] = {
            "point": point.to_json(),
            "environment": self.fingerprint,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "load_before": round(load, 2),
            "matmul_flops_per_second": flops_per_second,
            "flops": point.flops(steps),
            "floor_ms": 1e3 * point.flops(steps) / flops_per_second,
            "results": results,
            **more,
        }
        self.write()

    def write(self) -> None:
        """To a new file first, which then takes the old one's place: an interruption leaves one of the two whole."""
        set_floors(self.content)
        used = {entry["environment"] for entry in self.content["points"].values()} | {self.fingerprint}
        environments = self.content["environments"]
        self.content["environments"] = {name: environments[name] for name in environments if name in used}
        replace(self.path, dumps(self.content))


def set_floors(content: dict[str, Any]) -> None:
    """Every floor at the best rate that its environment has ever shown: a busy moment must not lower the bar."""
    best: dict[tuple[str, str], float] = {}
    rates = {
        "matmul_flops_per_second": lambda entry: entry.get("rate_of", ""),
        "copy_bytes_per_second": lambda _: "copy",
    }
    for entry in content["points"].values():
        for rate, which in rates.items():
            name = entry["environment"], which(entry)
            best[name] = max(best.get(name, 0.0), entry.get(rate, 0.0))
    for entry in content["points"].values():
        entry["floor_ms"] = 1e3 * entry["flops"] / best[entry["environment"], entry.get("rate_of", "")]
        if "bytes" in entry:
            bytes_ms = 1e3 * entry["bytes"] / best[entry["environment"], "copy"]
            entry["floor_ms"] = max(entry["floor_ms"], bytes_ms)


def dumps(content: dict[str, Any]) -> str:
    """The text of ``results.json``, short enough for a repository: samples to five digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {name: rounded(entry) for name, entry in value.items()}
        return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value

    return json.dumps(rounded(content), indent=1) + "\n"


def replace(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
