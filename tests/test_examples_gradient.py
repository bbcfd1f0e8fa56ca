"""The example about the flow of gradients runs as a newcomer runs it, and shows what it says."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")
pytest.importorskip("arch", reason="the S&P 500 data ship with arch")

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "gradient_flow.py"


@pytest.mark.slow
def test_a_quick_run_shows_gradients_that_vanish_and_explode_and_gates_that_keep_them(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, "-W", "error", str(SCRIPT), "--quick"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert (tmp_path / "gradient_flow.png").stat().st_size > 10_000
    ends = dict(re.findall(r"^(\S.*?)  .*: (vanishes|arrives|explodes)$", run.stdout, re.MULTILINE))
    assert ends["Elman, radius 0.5"] == "vanishes"
    assert ends["Elman, radius 1.5"] == "explodes"
    assert ends["LSTM, forget bias 2"] == ends["GRU, update bias 4"] == "arrives"
