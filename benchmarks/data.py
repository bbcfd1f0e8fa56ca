"""What every peer is given, and what it must answer: inputs, parameters, and the reference's values and gradients.

Parameters are jrnn's (``w_ih (F, G*H)``, ``w_hh (H, G*H)``, ``b (G*H,)``, ``b_hn (H,)`` for a GRU): one dict for each
direction of each layer, in tuples. Peers convert them to names, orders and layouts of their own.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid import GATES, Point

STEPS_CHECKED = 8  # how many single steps are folded to check streaming

# Equations that a peer may have in place of jrnn's usual ones: which jrnn cell has them, and which parameters it lacks.
EQUATIONS = {
    "lstm": ("lstm", (), {}),
    "gru": ("gru", (), {}),
    "gru, reset before the product": ("gru", ("b_hn",), {"reset": "before"}),
    "gru without b_hn": ("gru", ("b_hn",), {}),
    "elman": ("elman", (), {}),
    "elman with relu": ("elman", (), {"activation": "relu"}),
}


def make_cell(equations: str, hidden: int) -> Any:
    """The jrnn cell with these equations."""
    import jrnn

    name, _, options = EQUATIONS[equations]
    return getattr(jrnn, name)(hidden, **options)


def make_model(cell: Any, point: Point) -> Any:
    """The cell in as many layers and directions as the point has."""
    import jrnn

    layer = jrnn.bidirectional(cell) if point.bidirectional else cell
    return jrnn.stack(*([layer] * point.layers)) if point.layers > 1 else layer


def model_params(point: Point, params: Any) -> Any:
    """Parameters as `make_model`'s model has them, from one dict a direction and layer."""
    layers = [dict(zip(("forward", "backward"), p, strict=True)) if point.bidirectional else p[0] for p in params]
    return tuple(layers) if point.layers > 1 else layers[0]


def reduced(equations: str, params: Any) -> Any:
    """Parameters without those that the equations lack."""
    _, lacking, _ = EQUATIONS[equations]
    return tuple(tuple({k: v for k, v in p.items() if k not in lacking} for p in layer) for layer in params)


def make(point: Point) -> dict[str, Any]:
    """Inputs and parameters: ``xs (T, B, F)``, ``weights`` like the outputs and zero in padding, ``lengths (B,)``."""
    rng = np.random.default_rng(zlib.crc32(repr(point.shape).encode()))
    columns, bound = GATES[point.cell] * point.hidden, point.hidden**-0.5

    def draw(features: int) -> dict[str, np.ndarray]:
        # Biases too, as in torch: at zero, one in the wrong place would not show.
        shapes: dict[str, tuple[int, ...]] = {"w_ih": (features, columns), "w_hh": (point.hidden, columns)}
        shapes |= {"b": (columns,)} | ({"b_hn": (point.hidden,)} if point.cell == "gru" else {})
        return {name: rng.uniform(-bound, bound, shape).astype(np.float32) for name, shape in shapes.items()}

    params = tuple(tuple(draw(features) for _ in range(point.directions)) for features in point.layer_features())
    time = STEPS_CHECKED if point.work == "step" else point.time
    lengths = np.full(point.batch, point.time, np.int32)
    if point.ragged:
        lengths = rng.permutation(np.linspace(point.time / 4, point.time, point.batch).astype(np.int32))
    valid = (np.arange(time)[:, None] < (time if point.work == "step" else lengths))[..., None]
    weights = rng.standard_normal((time, point.batch, point.out_features), np.float32)
    xs = rng.standard_normal((time, point.batch, point.features), np.float32)
    return {"xs": xs, "weights": weights * valid, "lengths": lengths, "params": params}


def resets(point: Point) -> np.ndarray | None:
    """``(T, B)`` booleans, where a point has episodes: they begin anew at one step of twenty."""
    if not point.resets:
        return None
    rng = np.random.default_rng(zlib.crc32(repr(("resets", point.shape)).encode()))
    return rng.random((point.time, point.batch)) < 0.05


def expected(point: Point, equations: str, data: dict[str, Any]) -> dict[str, Any]:
    """What jrnn's reference schedule answers, in float32: ``ys``, and for training also ``value`` and gradients."""
    import jax
    import jax.numpy as jnp

    import jrnn

    model = make_model(make_cell(equations, point.hidden), point)
    lengths = data["lengths"] if point.ragged else None

    def fill(p: Any) -> Any:
        if equations == "gru without b_hn":
            return p | {"b_hn": jnp.zeros(point.hidden, jnp.float32)}
        return p

    @jax.jit
    def run(params: Any, xs: Any) -> Any:
        params = tuple(tuple(fill(p) for p in layer) for layer in params)
        options = {"lengths": lengths, "resets": resets(point), "backend": "reference"}
        return jrnn.unroll(model, model_params(point, params), xs, **options)[1]

    @jax.jit
    def gradients(params: Any, xs: Any) -> Any:
        return jax.value_and_grad(lambda p, x: jnp.sum(run(p, x) * data["weights"]), argnums=(0, 1))(params, xs)

    params = reduced(equations, data["params"])
    ys = run(params, data["xs"])
    answer: dict[str, Any] = {"ys": np.asarray(ys)}
    if point.work == "train":
        value, (d_params, d_xs) = jax.tree.map(np.asarray, gradients(params, data["xs"]))
        # The value is a sum of many terms of both signs: errors are measured against a sum of random signs.
        scale = np.linalg.norm((answer["ys"] * data["weights"]).ravel())
        answer |= {"value": value, "scale": scale, "xs": d_xs, "params": d_params}
    return answer


def errors(point: Point, got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Relative errors, in the Euclidean norm of each array; the worst one for the parameters.

    A peer must answer all that is asked of it: for training the value and every gradient, otherwise the outputs.
    """
    if point.work != "train":
        return {"ys": _relative(got.get("ys"), want["ys"])}
    d_params, wanted = flatten(got.get("params", ())), flatten(want["params"])
    error = abs(float(got.get("value", np.nan)) - float(want["value"])) / float(want["scale"])
    return {
        "value": float(error) if np.isfinite(error) else float("inf"),
        "inputs' gradients": _relative(got.get("xs"), want["xs"]),
        "parameters' gradients": max(_relative(d_params.get(name), value) for name, value in wanted.items()),
    }


def tolerance(point: Point) -> float:
    """The largest relative error with which a peer is still timed: rounding, and nothing else."""
    return {"bfloat16": 0.05, "float16": 0.02, "tf32": 0.01}.get(point.arithmetic, 2e-4)


def agrees(point: Point, errors: dict[str, float]) -> bool:
    """Whether a peer may be timed. Written so that an error that is not a number does not pass."""
    return all(error <= tolerance(point) for error in errors.values())


def _relative(got: Any, want: Any) -> float:
    if got is None:
        return float("inf")
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    if got.shape != want.shape:
        return float("inf")
    error = float(np.linalg.norm((got - want).ravel()) / max(float(np.linalg.norm(want.ravel())), 1e-30))
    return error if np.isfinite(error) else float("inf")


# --- files, by which the driver hands arrays to its workers ---------------------------------------------------------


def flatten(params: Any) -> dict[str, np.ndarray]:
    """``{"layer/direction/name": array}``, in a fixed order."""
    return {
        f"{i}/{j}/{name}": value
        for i, layer in enumerate(params)
        for j, direction in enumerate(layer)
        for name, value in sorted(direction.items())
    }


def unflatten(flat: dict[str, np.ndarray]) -> Any:
    """The other way round."""
    nested: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for path, value in flat.items():
        i, j, name = path.split("/")
        nested.setdefault(int(i), {}).setdefault(int(j), {})[name] = value
    return tuple(tuple(nested[i][j] for j in sorted(nested[i])) for i in sorted(nested))


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes inputs or answers to an ``.npz`` file."""
    arrays = {name: value for name, value in content.items() if name != "params"}
    arrays |= {f"params/{name}": value for name, value in flatten(content.get("params", ())).items()}
    np.savez(path, **arrays)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote."""
    with np.load(path) as file:
        content = {name: file[name] for name in file.files if not name.startswith("params/")}
        params = {name.removeprefix("params/"): file[name] for name in file.files if name.startswith("params/")}
    return content | ({"params": unflatten(params)} if params else {})
