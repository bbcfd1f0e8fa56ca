"""The README's Python blocks run as they stand, top to bottom, each file of its own."""

import pathlib
import re

import pytest

from jrnn.schedules.native import build

pytestmark = pytest.mark.usefixtures("quick_compilation")

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_the_readme_has_examples():
    assert BLOCKS


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block_runs(number):
    if 'backend="native"' in BLOCKS[number] and not build.available()[0]:
        pytest.skip(build.available()[1])
    for name in set(re.findall(r"^(?:import|from) (\w+)", BLOCKS[number], re.M)):
        pytest.importorskip(name, reason=f"{name} is not installed")
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})
