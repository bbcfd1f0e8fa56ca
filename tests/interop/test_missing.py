"""Without a framework, its converters say what to install; and importing jrnn.interop imports none of them."""

import subprocess
import sys

import pytest

CALLS = {
    "torch": ("from_torch(None)", "to_torch(cell, params)", "pip install torch"),
    "keras": ("from_keras(None)", "to_keras(cell, params)", "pip install .jrnn[keras]"),
    "flax": ("from_flax(None)", "to_flax(cell, params)", "pip install .jrnn[flax]"),
    "equinox": ("from_equinox(None)", "to_equinox(cell, params)", "pip install .jrnn[equinox]"),
    "onnx": ("from_onnx(None)", "to_onnx(cell, params)", "pip install .jrnn[onnx]"),
    "safetensors": ("load_torch(cell, 'x.safetensors')",) * 2 + ("pip install .jrnn[safetensors]",),
}


def test_without_a_framework_the_error_says_what_to_install():
    code = f"""
import re, sys, jax, jrnn
calls = {CALLS!r}
import jrnn.interop
assert not (set(calls) | {{"haiku"}}) & set(sys.modules), sys.modules
cell = jrnn.gru(2)
params = cell.init(jax.random.key(0), 3)
for name, (there, back, remedy) in calls.items():
    sys.modules[name] = None
    for call in (there, back):
        try:
            eval("jrnn.interop." + call)
        except ImportError as error:
            assert name in str(error) and remedy.replace(".jrnn", '"jrnn') in str(error), error
        else:
            raise SystemExit(call + ": no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["flax", "haiku", "equinox", "keras", "onnx", "torch"])
def test_every_public_name_is_there(name):
    import jrnn

    for prefix in ("from", "to"):
        function = getattr(jrnn.interop, f"{prefix}_{name}")
        assert ">>> " in function.__doc__
