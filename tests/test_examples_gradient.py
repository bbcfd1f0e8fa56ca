"""The example about the flow of gradients runs as a newcomer runs it, and shows what it says."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")
pytest.importorskip("arch", reason="the S&P 500 data ship with arch")

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "gradient_flow.py"


@pytest.mark.slow
def test_a_quick_run_shows_gradients_that_vanish_and_explode_and_gates_that_keep_them(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, "-W", "error", str(SCRIPT), "--quick"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert (tmp_path / "gradient_flow.png").stat().st_size > 10_000
    rows = {line[:20].strip(): line.split() for line in run.stdout.splitlines()}
    kept = {name: float(cells[-1]) for name, cells in rows.items() if name in ("LSTM", "GRU") or "radius 0.5" in name}
    assert kept["Elman, radius 0.5"] < 1e-20
    assert float(rows["Elman, radius 1.5"][-1]) > 100
    assert 1e-3 < kept["LSTM"] < 1e3
    assert 1e-3 < kept["GRU"] < 1e3
    assert "below 0.9 ** (t-k): True" in run.stdout
