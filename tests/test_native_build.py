"""What compiles the native loop: which libraries are loaded, where they are kept, and what is said where that fails."""

import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jrnn
from jrnn.schedules import Refusal, Steps, Task, native
from jrnn.schedules.native import build, cache

pytestmark = pytest.mark.skipif(not build.available()[0], reason=build.available()[1] or "")


def answering(number):
    """A library that is compiled in no time."""
    text = f'extern "C" int answer() {{ return {number}; }}'
    return build.Library("test", build.compiler(), {"answer.cc": ()}, {"answer.cc": text})


def answer(number, *directories):
    return build._loaded(answering(number), directories).answer()


def libraries(directory):
    return sorted(directory.glob("jrnn_*.so"))


@pytest.fixture
def private(tmp_path):
    directory = tmp_path / "private"
    directory.mkdir(mode=0o700)
    return directory


def fake_compiler(path, text):
    """A compiler that says its version, and otherwise runs the given shell command."""
    path.mkdir()
    program = path / "g++"
    program.write_text(f'#!/bin/sh\ncase "$1" in --version) echo {path};; *) {text};; esac\n')
    program.chmod(0o755)
    return str(program)


def test_the_digest_covers_every_file_and_every_include():
    known = {*build.LOOP, *build.LOOP_HEADERS, *build.CELL, *build.CELL_HEADERS, *build.LINEAR, *build.LINEAR_HEADERS}
    folder = Path(build.__file__).parent
    assert known == {path.name for path in folder.iterdir() if path.suffix in (".cc", ".h")}
    libraries = [
        (build.LOOP, build.LOOP_HEADERS),
        (build.CELL, build.CELL_HEADERS),
        (build.LINEAR, build.LINEAR_HEADERS),
    ]
    for sources, headers in libraries:
        for name in (*sources, *headers):
            included = set(re.findall(r'#include "(\w+\.h)"', (folder / name).read_text())) - {"cell.h"}
            assert included <= set(headers), name


# --- what cannot be compiled -------------------------------------------------------------------------------------


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    cell = jrnn.elman(4, jnp.arctan)  # used by no other test: nothing of it is loaded
    params = cell.init(jax.random.key(0), 3)
    task = Task.of(cell, params, jnp.ones((4, 2, 3)), cell.initial_state(params, (2,)), Steps())
    found = native.plan(task)
    assert isinstance(found, Refusal)
    assert "needs a C++ compiler" in found.reason


@pytest.mark.parametrize(
    ("command", "directory", "reason"),
    [
        ("echo 'x.h:1: error: no such thing' >&2; false", "cache", "no such thing"),
        (r"printf 'x.h:1: error: \377\376 no such thing' >&2; false", "cache", "\ufffd no such thing"),
        ("false", "cache", "compiler failed"),
        ("true", "file/cache", "file"),
    ],
    ids=("error", "bytes", "silent", "directory"),
)
def test_a_machine_that_cannot_compile(monkeypatch, tmp_path, command, directory, reason):
    """It is said before anything runs."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "bin", command))
    monkeypatch.setenv("JRNN_CACHE_DIR", str(tmp_path / directory))
    found, why = build.available()
    assert not found
    assert reason in why
    assert "\n" not in why


def test_a_compiler_that_fails_says_so(private):
    library = build._cell_library("this is no C++", build.compiler())
    reason = build._loaded(library, (private,))
    assert reason.startswith("the C++ compiler failed: ")
    assert "cell.h" in reason
    assert "error" in reason
    assert not list(private.iterdir())


def test_a_failing_compilation_is_tried_once(monkeypatch, tmp_path):
    """And not again at each trace."""
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "bin", f"echo >> {log}; false"))
    monkeypatch.setenv("JRNN_CACHE_DIR", str(tmp_path / "cache"))
    tries = []
    for _ in range(3):
        with pytest.raises(RuntimeError, match="compiler failed"):
            build.load("// a cell that nothing else loads")
        tries.append(len(log.read_text()))
    assert tries[0] > 0
    assert tries == tries[:1] * 3


def test_switched_off(monkeypatch):
    monkeypatch.setenv("JRNN_NATIVE", "0")
    assert build.available() == (False, "switched off by JRNN_NATIVE=0")


# --- what is loaded ----------------------------------------------------------------------------------------------


def test_compiled_once(monkeypatch, private):
    """Cells that differ in size alone share a kernel, and a kernel that is there is not made again."""
    headers = {
        native.read_gates(c.form(c.init(jax.random.key(0), 3)), c.initial_state({"w_hh": jnp.ones(1)}, ()))[1]
        for c in map(jrnn.lstm, (4, 8))
    }
    assert len(headers) == 1
    library = build._cell_library(*headers, build.compiler())
    block = build._loaded(library, (private,)).jrnn_unit_block()
    monkeypatch.setattr(build.subprocess, "Popen", None)
    assert build._loaded(library, (private,)).jrnn_unit_block() == block


FAULTS = {
    "truncated": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    "empty": lambda content: b"",
    "garbage": lambda content: b"garbage",
    "longer": lambda content: content + b"more",
    "without its digest": lambda content: content[:-32],
}


def replace(path, content, mode=0o644):
    """By a new file: one that a process has mapped must not be written to."""
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.parametrize("damage", FAULTS.values(), ids=FAULTS)
def test_a_damaged_library_is_made_anew(private, damage):
    """It is never loaded, and said once."""
    assert answer(1, private) == 1
    (path,) = libraries(private)
    replace(path, damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=f"{path} is damaged; it was compiled again"):
        assert answer(1, private) == 1
    assert answer(1, private) == 1
    assert cache.fault(path) is None


def test_a_damaged_library_that_cannot_be_made_anew(monkeypatch, private):
    answer(1, private)
    (path,) = libraries(private)
    replace(path, b"")
    monkeypatch.setattr(build, "_run", read_only)
    assert f"{path} is damaged, and cannot be made anew: " in build._loaded(answering(1), (private,))


def read_only(*_):
    raise PermissionError("read-only")


@pytest.mark.parametrize("mode", [0o664, 0o646], ids=oct)
def test_a_library_that_others_can_write_to_is_made_anew(private, mode):
    answer(1, private)
    (path,) = libraries(private)
    path.chmod(mode)
    with pytest.warns(RuntimeWarning, match="can be written to by its group or by others"):
        answer(1, private)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_library_of_another_user_is_made_anew(private):
    answer(1, private)
    (path,) = libraries(private)
    os.chown(path, 12345, 12345)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        answer(1, private)
    assert path.stat().st_uid == 0


@pytest.mark.parametrize("mode", [0o770, 0o707], ids=oct)
def test_a_directory_that_others_can_write_to_is_refused(private, mode):
    private.chmod(mode)
    reason = build._loaded(answering(1), (private,))
    assert f"run chmod go-w {private}" in reason
    assert not libraries(private)


# --- where it is kept --------------------------------------------------------------------------------------------


@pytest.fixture
def unnamed(monkeypatch, tmp_path):
    """No directory is asked for by name; that of temporary files is one of the test's own."""
    for name in ("JRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / f"jrnn-{os.geteuid()}"


def test_a_relative_directory_stays_where_it_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JRNN_CACHE_DIR", "of-this-test")
    first = cache.cache_directory()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cache.cache_directory() == first == tmp_path / "of-this-test"


def test_a_directory_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JRNN_CACHE_DIR", "~/mine")
    assert cache.cache_directory() == tmp_path / "mine"
    monkeypatch.setenv("JRNN_CACHE_DIR", "~nobody-has-this-name/mine")
    found, reason = build.available()
    assert not found
    assert "there is no such home directory" in reason


@pytest.mark.parametrize("home", ["", "relative", "~/.cache"])
def test_no_home_directory(monkeypatch, tmp_path, unnamed, home):
    """Nothing is made in the working directory."""
    monkeypatch.setattr(cache.os.path, "expanduser", lambda path: home)  # as where the user is in no list either
    assert cache.cache_directory() == unnamed
    assert list(tmp_path.iterdir()) == [unnamed]


def test_a_cache_of_the_user(monkeypatch, tmp_path, unnamed):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_directory() == tmp_path / "home/.cache/jrnn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # invalid, says the specification
    assert cache.cache_directory() == tmp_path / "home/.cache/jrnn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_directory() == tmp_path / "xdg/jrnn"


def test_a_directory_to_fall_back_to(monkeypatch, tmp_path, unnamed):
    """Where the cache directory cannot be made, one under the temporary directory, unless others can write to it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answer(1, *cache.directories()) == 1
    assert cache.cache_directory() == unnamed
    assert len(libraries(unnamed)) == 1
    assert unnamed.stat().st_mode & 0o777 == 0o700
    unnamed.chmod(0o777)
    assert "run chmod go-w" in build._loaded(answering(1), cache.directories())
    with pytest.raises(OSError, match=f"(?s)file.*; {unnamed} can be written to .* JRNN_CACHE_DIR"):
        cache.cache_directory()


def test_a_cache_that_became_read_only(monkeypatch, private, tmp_path):
    """What is there is loaded from there; what is not is made in the next directory."""
    answer(1, private)
    work = cache.work
    monkeypatch.setattr(cache, "work", lambda directory: (read_only if directory == private else work)(directory))
    other = tmp_path / "other"
    assert answer(1, private, other) == 1
    assert answer(2, private, other) == 2
    assert [len(libraries(directory)) for directory in (private, other)] == [1, 1]


# --- how it stays small ------------------------------------------------------------------------------------------


def aged(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_folders_of_killed_compilations_are_swept(private):
    """Old ones: another process may be compiling in a new one. What is not jrnn's stays."""
    for name in ("jrnn_tmp_killed", "jrnn_tmp_at_work", "tmpother"):
        (private / name).mkdir()
        (private / name / "cell.h").write_text("")
    aged(private / "jrnn_tmp_killed", 7200)
    aged(private / "tmpother", 7200)
    answer(1, private)
    assert {path.name for path in private.iterdir() if path.is_dir()} == {"jrnn_tmp_at_work", "tmpother"}


def test_a_killed_compilation_leaves_a_folder_that_is_swept(private):
    """The folder is one of those that are swept."""
    code = f"""
import os, signal
from pathlib import Path
from jrnn.schedules.native import build
build._run = lambda commands: os.kill(os.getpid(), signal.SIGKILL)
build._loaded(build.Library("test", build.compiler(), {{"a.cc": ()}}, {{"a.cc": ""}}), (Path({str(private)!r}),))
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (folder,) = private.iterdir()
    aged(folder, 7200)
    cache.tidy(private)
    assert not folder.exists()


def test_the_cache_is_bounded(monkeypatch, private):
    """What was used longest ago goes first; a use counts, not only the compilation."""
    answer(1, private)
    (first,) = libraries(private)
    answer(2, private)
    (second,) = set(libraries(private)) - {first}
    aged(first, 300)
    aged(second, 200)
    answer(1, private)  # a use
    monkeypatch.setattr(cache, "LIMIT", int(2.5 * first.stat().st_size))
    answer(3, private)
    assert len(libraries(private)) == 2
    assert first.exists()
    assert not second.exists()


def test_clear_cache(monkeypatch, private):
    monkeypatch.setenv("JRNN_CACHE_DIR", str(private))
    answer(1, private)
    (private / "other").write_text("")
    jrnn.native.clear_cache()
    assert [path.name for path in private.iterdir()] == ["other"]
    assert answer(1, private) == 1


# --- programs in files -------------------------------------------------------------------------------------------

PROGRAM = """
import pickle, sys
import jax, jax.numpy as jnp
from jax.experimental import serialize_executable
import jrnn

cell = jrnn.lstm(8)
params, xs = jax.eval_shape(lambda: (cell.init(jax.random.key(0), 3), jnp.zeros((5, 2, 3))))
run = jax.jit(jax.grad(lambda params, xs: jrnn.unroll(cell, params, xs, backend="native")[1].sum()))
"""
READER = (
    PROGRAM
    + """
kept, params, xs, expected = pickle.load(open(sys.argv[1], "rb"))
try:
    serialize_executable.deserialize_and_load(*kept)(params, xs)
except Exception as error:
    assert "No FFI handler registered" in str(error), error
else:
    raise AssertionError("nothing to register")
jrnn.native.register(run, params, xs)
got = serialize_executable.deserialize_and_load(*kept)(params, xs)
assert jax.tree.all(jax.tree.map(jnp.array_equal, got, expected))
"""
)


def test_an_executable_in_another_process(tmp_path):
    from jax.experimental import serialize_executable

    names: dict = {}
    exec(PROGRAM, names)
    params, xs = names["cell"].init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (5, 2, 3))
    compiled = names["run"].lower(params, xs).compile()
    path = tmp_path / "kept"
    kept = serialize_executable.serialize(compiled)
    path.write_bytes(pickle.dumps((kept, *jax.device_get((params, xs, compiled(params, xs))))))
    subprocess.run([sys.executable, "-c", READER, str(path)], check=True, cwd=Path(__file__).parents[1])


def test_a_program_that_calls_no_loop():
    with pytest.raises(ValueError, match=r"calls none here; jrnn\.choose_backend"):
        jrnn.native.register(jnp.sin, jnp.ones(3))
