"""Flax is imported where it is used, and where it is missing the error says what installs it."""

import subprocess
import sys

WITHOUT = """
import sys
sys.modules["flax"] = None  # as if it were not installed
import jrnn
for load in (lambda: jrnn.flax.linen, lambda: __import__("jrnn.flax.nnx")):
    try:
        load()
    except ImportError as error:
        assert 'pip install "jrnn[flax]"' in str(error), error
    else:
        raise AssertionError("no error")
"""


def test_an_error_without_flax_names_the_extra():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)
