"""What the documentation must have, without building it: every public name, code that runs, and one version."""

import ast
import importlib
import importlib.util
import os
import pathlib
import re
import sys
import tomllib

import jax
import pytest

import jrnn

ROOT = pathlib.Path(__file__).parent.parent
API = ROOT / "docs" / "api"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(API.glob("*.md"))]
MODULES = sorted(re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in API.glob("*.md"))))

# Blocks of Python that are no code cells, which the build would run: the page, the library that they import, and
# whether the test below runs them.
PLAIN = {
    ("coming_from", "torch"): True,  # no extra installs PyTorch, and the pages are built with the extra `docs` alone
    ("coming_from", "keras"): True,  # Keras asks for its backend before it is imported, and is in the extra `test`
    ("training", "torch"): True,
    ("training", "tensorflow"): False,  # TensorFlow is too large for the tests
}


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


def shown(module):
    """The names of a module that its page shows: those of ``:members:``, or those that are listed one by one."""
    pages = "".join(page.read_text() for page in sorted(API.glob("*.md")))
    options = re.search(rf"automodule:: {re.escape(module)}\n((?:   :.*\n)*)", pages)[1]
    members = re.search(r":members:(.*)", options)
    if members is None:
        return {name.removeprefix(f"{module}.") for name in documented() if name.startswith(f"{module}.")}
    found = importlib.import_module(module)
    # What `:members:` shows: no private names, and none without a docstring.
    listed = [name.strip() for name in members[1].split(",") if name.strip()] or found.__all__
    return {name for name in listed if getattr(found, name).__doc__}


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_makes_public_is_what_its_page_shows(module):
    found = importlib.import_module(module)
    assert found.__doc__
    missing = set(found.__all__) - shown(module)
    if module.startswith("jrnn.interop."):  # what they convert: their functions are those of jrnn.interop
        missing -= shown("jrnn.interop")
    elif module == "jrnn.flax":  # its two modules are on the page, one by one
        missing -= {name.removeprefix("jrnn.flax.") for name in MODULES}
    assert not missing, f"not on a page of docs/api, or without a docstring: {sorted(missing)}"


def blocks(page):
    """The blocks of Python of a page, in order: whether the build runs them, and their lines."""
    fences = re.findall(r"^```(\{code-cell\} *\w*|py\w*)[^\n]*\n(.*?)^```$", page.read_text(), re.M | re.S | re.I)
    for kind, code in fences:
        yield kind.startswith("{"), re.sub(r"^:\w+:.*\n", "", code, flags=re.M)


def imports(code):
    """The names of the packages that are imported, but for those of the standard library."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def plain(code, page):
    """The row of the table above that a plain block belongs to."""
    found = [(page.stem, name) for name in sorted(imports(code)) if (page.stem, name) in PLAIN]
    return found[0] if len(found) == 1 else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_a_page_is_run_by_the_build(page):
    assert not re.search(r"code-block::|literalinclude::", page.read_text())
    for is_cell, code in blocks(page):
        assert is_cell or plain(code, page), f"make it a {{code-cell}}, or a row of PLAIN that says why not:\n{code}"


def test_the_table_of_plain_blocks_has_no_row_too_many():
    assert {plain(code, page) for page in PAGES for is_cell, code in blocks(page) if not is_cell} == set(PLAIN)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("stem", "library"), [row for row, runs in PLAIN.items() if runs])
def test_a_block_that_the_build_does_not_run(stem, library, monkeypatch):
    """It runs after the first code cell of its page, if that comes before it, and those before it in its section."""
    if library == "keras" and os.environ.get("KERAS_BACKEND", "jax") != "jax":
        pytest.skip("Keras runs on another backend than JAX")
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # restored after the block has set it
    pytest.importorskip(library, reason=f"{library} is not installed")
    names = {"__name__": f"docs.{stem}"}
    page = ROOT / "docs" / f"{stem}.md"
    everything = list(blocks(page))
    number = next(i for i, (is_cell, code) in enumerate(everything) if not is_cell and plain(code, page)[1] == library)
    code = everything[number][1]
    section = page.read_text().partition(code)[0].rpartition("\n## ")[2]
    cells = [cell for i, (is_cell, cell) in enumerate(everything[:number]) if is_cell and (i == 0 or cell in section)]
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        for part in [*cells, code]:
            for name in sorted(imports(part)):
                pytest.importorskip(name, reason=f"{name} is not installed")
            exec(compile(part, page.name, "exec"), names)


def test_what_pages_import_comes_with_the_extra_docs():
    """`pip install -e ".[docs]" && make docs` runs every code cell."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def packages(requirements):
        for requirement in requirements:
            name, inner = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement).groups()
            yield {"orbax-checkpoint": "orbax", "myst-nb": "myst_nb"}.get(name, name).replace("-", "_")
            for extra in (inner or "").split(",") if name == "jrnn" else ():
                yield from packages(extras[extra] if extra else ())

    known = {"jrnn", *packages(project["dependencies"]), *packages(extras["docs"])}
    for page in PAGES:
        for is_cell, code in blocks(page):
            assert not is_cell or imports(code) <= known, f"{page.name}: {imports(code) - known}"
    assert "sphinx" in set(packages(extras["dev"])), "CONTRIBUTING says that make docs runs with the extra dev"


def test_folders_import_only_from_those_above_them_in_the_internals():
    table = (ROOT / "docs" / "internals.md").read_text().partition("| folder |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(?:jrnn/)?(\w+)(?:\.py)?`", row.split("|")[1]) for row in table.splitlines()[2:]]
    rank = {name: i for i, row in enumerate(rows) for name in row}
    upwards = set()
    for file in sorted((ROOT / "jrnn").rglob("*.py")):
        path = file.relative_to(ROOT / "jrnn")
        own = path.parts[0].removesuffix(".py")
        assert own in rank or own == "__init__", f"no row for {own}"
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            found = {name.split(".")[1] for name in names if name.startswith("jrnn.")} & set(rank)
            upwards |= {(str(path), name) for name in found if own in rank and rank[name] > rank[own]}
    assert upwards == {("cells/base.py", "run")}  # the page names this one


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
