"""The table of a model's layers, over all rows of the table of cases."""

import jax
import pytest

import jrnn
from tests.cases import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_counts_every_parameter_once(case):
    lines = jrnn.summary(case.layer, case.in_features).splitlines()
    params = jax.eval_shape(lambda key: case.layer.init(key, case.in_features), jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    start = lines[0].index("features") + len("features")
    counts = [(len(line) - len(line.lstrip()), int(line[start:].split()[0].replace(",", ""))) for line in lines[1:]]
    assert counts[0] == (0, total)
    if len(counts) > 1:
        assert sum(count for indent, count in counts if indent == 2) == total
    assert all(str(tuple(leaf.shape)) in "\n".join(lines) for leaf in jax.tree.leaves(params))


def test_what_is_no_layer_is_named():
    with pytest.raises(TypeError, match="model: expected a layer"):
        jrnn.summary([jrnn.gru(3)], 2)
