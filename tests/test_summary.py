"""The table of a model's layers, over all rows of the table of cases."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import jrnn
from tests.cases import CASES


def rows_of(text):
    """The rows of a table: indent, name, features, count and the shapes that are written behind it."""
    for line in text.splitlines()[1:]:
        name, features, count, *shapes = re.split(r"\s{2,}", line.strip())
        sizes = [re.findall(r"\d+", shape) for shape in re.findall(r"\(([\d, ]*)\)", "".join(shapes))]
        own = sum(math.prod(map(int, shape)) for shape in sizes)
        yield len(line) - len(line.lstrip()), name, features, int(count.replace(",", "")), own


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_counts_every_parameter_once(case):
    rows = list(rows_of(jrnn.summary(case.layer, case.in_features)))
    params = jax.eval_shape(lambda key: case.layer.init(key, case.in_features), jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert rows[0][3] == total == sum(own for *_, own in rows)
    for i, (indent, _, _, count, own) in enumerate(rows):
        below = list(itertools.takewhile(lambda row, indent=indent: row[0] > indent, rows[i + 1 :]))
        assert count == own + sum(row[3] for row in below if row[0] == indent + 2)


def test_the_parts_of_combinators_are_rows_one_of_your_own_too():
    model = Doubled(jrnn.tied(jrnn.embed(50, 8), jrnn.stack(jrnn.attention(jrnn.gru(8), 6), jrnn.dense(8))))
    got = [(indent, name, features) for indent, name, features, _, _ in rows_of(jrnn.summary(model, None))]
    assert got == [
        (0, "Doubled", "50"),
        (2, "layer: Tied", "50"),
        (4, "embed: Embed", "8"),
        (4, "layer: Stack", "8"),
        (6, "Attention(GRU)", "14"),
        (6, "Dense", "8"),
    ]


@dataclasses.dataclass(frozen=True)
class Doubled(jrnn.Layer):
    layer: jrnn.Layer
    event_ndim = 0

    def init(self, key, in_features):
        return {"layer": self.layer.init(key, in_features), "scale": jnp.array(2.0)}

    def initial_state(self, params, batch_shape):
        return self.layer.initial_state(params["layer"], batch_shape)

    def out_features(self, in_features):
        return self.layer.out_features(in_features)

    def walk(self, run, params, xs, state):
        state, ys = run(self.layer, params["layer"], xs, state)
        return state, params["scale"] * ys


def test_a_layer_whose_walk_runs_its_own_steps_is_one_row():
    model = Twice(jrnn.gru(4))
    assert jrnn.unroll(model, model.init(jax.random.key(0), 3), jnp.ones((5, 3)))[1].shape == (5, 4)
    assert [row[:3] for row in rows_of(jrnn.summary(model, 3))] == [(0, "Twice(GRU)", "4")]


@dataclasses.dataclass(frozen=True)
class Twice(jrnn.Wrapper):
    cell: jrnn.Cell

    def walk(self, run, params, xs, state):
        state, ys = run.scan(self, params, xs, state)
        return state, 2 * ys


def test_what_is_no_layer_is_named():
    with pytest.raises(TypeError, match="model: expected a layer"):
        jrnn.summary([jrnn.gru(3)], 2)
