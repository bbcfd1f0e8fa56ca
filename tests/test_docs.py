"""What the documentation must have, without building it: every public name, and one version."""

import importlib
import pathlib
import re

import pytest

import jrnn

ROOT = pathlib.Path(__file__).parent.parent
API = ROOT / "docs" / "api"
MODULES = sorted(re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in API.glob("*.md"))))


def documented():
    """Full names that pages of the reference name, one by one or by their module."""
    names = set()
    for page in API.glob("*.md"):
        module = "jrnn"
        for directive, value in re.findall(r"\.\. (\w+):: (\S+)", page.read_text()):
            if directive in ("currentmodule", "automodule"):
                module = value
            elif directive.startswith("auto"):
                names.add(f"{module}.{value}")
    return names | set(MODULES)


@pytest.mark.parametrize("name", jrnn.__all__)
def test_every_public_name_is_in_the_reference(name):
    assert f"jrnn.{name}" in documented()


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_makes_public_is_what_its_page_shows(module):
    found = importlib.import_module(module)
    assert found.__doc__
    for name in found.__all__:
        assert getattr(found, name).__doc__, f"{module}.{name}"


def test_the_overview_names_everything_but_states():
    named = set(re.findall(r"`(\w+)`", jrnn.__doc__))
    assert {name for name in jrnn.__all__ if name[0].islower()} <= named


def test_every_page_is_in_a_table_of_contents():
    for folder in (ROOT / "docs", API):
        listed = set(re.findall(r"^(\w+(?:/\w+)?)$", (folder / "index.md").read_text(), re.M))
        pages = {page.stem for page in folder.glob("*.md")} - {"index"}
        assert pages <= listed, pages - listed


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {jrnn.__version__}\n" in citation
