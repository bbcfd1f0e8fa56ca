"""The example about the flow of gradients runs as a newcomer runs it, shows what it says, and names what it shows."""

import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jrnn
from tests.conftest import load_example

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


def test_title_and_axis_of_the_jacobians_name_the_same_derivative(monkeypatch, tmp_path):
    example = load_example("gradient_flow")
    monkeypatch.setattr(example, "DAYS", 4)
    xs, model = jnp.ones((4, 2, 1)), example.elman(1.5)
    params = example.start(model)
    lstm = jrnn.stack(jrnn.lstm(4), jrnn.dense(1))
    norms = example.gradient_norms(model, params, xs, lambda state, ys: jnp.sum(ys[-1]))
    flow = {"Elman, radius 1.5": norms, "LSTM, forget bias 2": norms}
    products = example.jacobian_products(model, params, xs)
    gates = example.gate_saturation(lstm, example.start(lstm), xs)
    figures, close = [], example.plt.close
    monkeypatch.setattr(example.plt, "close", figures.append)
    runs = {name: np.ones((3, 2)) for name in "abcd"}
    example.draw(flow, products, gates, runs, tmp_path / "a.png")
    close(figures[0])
    axes = figures[0].axes[2]
    derivatives = [re.search(r"d.\$_.\$/d.\$_.\$", text)[0] for text in (axes.get_title(), axes.get_ylabel())]
    assert derivatives == ["dh$_t$/dh$_k$"] * 2


@pytest.mark.parametrize("out", ["/no/such/folder/a.png", "a.foo"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_training(out, capsys):
    with pytest.raises(SystemExit):
        load_example("gradient_flow").main(["--out", out])
    assert "--out: " in capsys.readouterr().err
