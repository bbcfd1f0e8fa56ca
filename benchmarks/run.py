"""Times jrnn beside every other library that is installed: ``python benchmarks/run.py``.

Writes ``results.json``, ``results.md`` and ``results.png``; picks up where an earlier run stopped. See README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if __name__ == "__main__":  # the repository in place of this folder, whose modules have names that others look for
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import data, driver, gpu, grid, machine, peers, report
from benchmarks.store import Store

AGAIN = 2  # times at most that a disturbed point is measured anew
FULL, QUICK = driver.Budget(9, 6.0), driver.Budget(5, 1.0)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="See benchmarks/README.md.")
    parser.add_argument("--quick", action="store_true", help="a few points, few repetitions: under two minutes")
    parser.add_argument("--only", metavar="TEXT", default="", help="only points whose name contains this")
    parser.add_argument("--peers", metavar="A,B", help=f"only these: {', '.join(peers.PEERS)}")
    parser.add_argument("--out", type=Path, help="folder for the results (default: one named after this machine)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--repeats", type=int, help=f"repetitions of each peer at a point (default {FULL.repeats})")
    parser.add_argument("--seconds", type=float, help=f"but stop a point after this long (default {FULL.seconds:.0f})")
    parser.add_argument(
        "--grid", choices=("cpu", "gpu", "settings", "suite"), default="cpu", help="what is measured, and on what"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="gpu, settings: begin no point that may end later")
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="gpu, settings: cpu for a trial without"
    )
    parser.add_argument("--list", action="store_true", help="print the points' names and stop")
    options = parser.parse_args(argv)
    if options.peers is not None:
        options.peers = [name.strip() for name in options.peers.split(",")]
        known = list(gpu.ENTRANTS if options.grid == "gpu" else peers.PEERS)
        known = list(gpu.settings_entrants()) if options.grid == "settings" else known
        unknown = sorted(set(options.peers) - set(known))
        if unknown:
            parser.error(f"--peers: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if options.grid == "suite" and (options.peers is not None or options.list):
        parser.error("--grid suite: expected neither --peers nor --list, which go with --grid gpu or settings")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.grid != "cpu":
        sys.exit(gpu.main(options))
    start = time.perf_counter()
    points = [p for p in (grid.quick() if options.quick else grid.full()) if options.only in p.id]
    if not points:
        sys.exit(f"--only: expected a part of a point's name (see --list), got {options.only!r}")
    if options.list:
        print("\n".join(point.id for point in points))
        return
    usual = QUICK if options.quick else FULL
    budget = driver.Budget(
        options.repeats or usual.repeats, usual.seconds if options.seconds is None else options.seconds
    )
    folder = options.out or Path(__file__).parent / "results" / ("quick" if options.quick else machine.slug())
    names = [name for name in options.peers or peers.PEERS if peers.available(name)]
    absent = [name for name in options.peers or peers.PEERS if name not in names]

    environment = machine.environment(dict(budget._asdict()))
    store = Store(folder, environment)
    if options.fresh:
        store.forget(points if options.only else None)
    for name in absent:
        store.content["peers"].setdefault(name, {"absent": True})
        print(f"{name}: not installed")
    todo = [point for point in points if not store.finished(point, names)]
    print(f"{len(todo)} of {len(points)} points to measure; results in {folder}")
    try:
        if todo:
            measure(store, points, todo, names, budget)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here")
    pictured = report.write(folder, store.content)
    wrote = f"wrote {folder / 'results.json'}, results.md" + (" and results.png" if pictured else "")
    print(f"{wrote} after {time.perf_counter() - start:.0f} s")


def measure(
    store: Store, points: list[grid.Point], todo: list[grid.Point], names: list[str], budget: driver.Budget
) -> None:
    """Runs what is to do, and keeps each point as soon as it is done; of all points the disturbed ones again."""
    rate = machine.matmul_rate()  # and again before each point: the floor is that of the best moment
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; starting {len(names)} processes")
    with driver.pool(names) as running:
        for name, form in running.forms.items():
            store.content["peers"][name] = {"form": form, "version": peers.version(name)}
        while todo:
            for index, point in enumerate(todo, 1):
                start, load = time.perf_counter(), os.getloadavg()[0]
                rate = max(rate, machine.matmul_rate(repeats=4))
                results = driver.measure(running, point, budget)
                steps = point.batch * point.time
                if point.ragged:
                    steps = int(data.make(point)["lengths"].sum())
                store.add(point, results, rate, load, steps, measured=store.measured(point) + 1)
                place, seconds = f"{index}/{len(todo)}", time.perf_counter() - start
                print(f"[{place}] {point.id}  ({seconds:.0f} s)  {report.line(store.content, point)}", flush=True)
            todo = [point for point in report.disturbed(store.content, points) if store.measured(point) <= AGAIN]
            if todo:
                print(f"again, since products ran slower than usual in their rounds: {len(todo)} points")


if __name__ == "__main__":
    main()
