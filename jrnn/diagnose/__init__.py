"""Why training fails or works: how gradients travel through time, measured on real parameters and a real batch.

`gradient_norms` says how much of the loss reaches the state of every step, `jacobian_products` why (the products of
the steps' Jacobians, and the bounds they obey), `gate_saturation` which gates have stopped passing gradients. Each
returns NumPy arrays, and has a plot.

Shared arguments:
  model, params, xs, state, lengths, mask, resets, reverse, key: as for `jrnn.unroll`; a step that is padding there is
    padding here, and everything measured is NaN at it.
  layer: which recurrent layer of a model to look at: an index into a stack, "forward" or "backward" for a direction of
    a bidirectional layer, or a tuple of them from the outside in, such as ``(1, "forward")``. `jrnn.residual` and
    `jrnn.highway` are looked through and take no place in it. None where there is but one recurrent layer. The
    layers below the chosen one feed it, those above carry its gradient.

Nothing here can be called inside jit: results are for reading, and leave the device.

T time, B batch (any number of leading axes, or none), F input features, H hidden features, N numbers in a state.
"""

from __future__ import annotations

from jrnn.diagnose.jacobians import JacobianProducts, jacobian_products, plot_jacobian_products
from jrnn.diagnose.norms import GradientNorms, gradient_norms, plot_gradient_norms
from jrnn.diagnose.saturation import GateSaturation, gate_saturation, plot_gate_saturation

__all__ = [
    "GateSaturation",
    "GradientNorms",
    "JacobianProducts",
    "gate_saturation",
    "gradient_norms",
    "jacobian_products",
    "plot_gate_saturation",
    "plot_gradient_norms",
    "plot_jacobian_products",
]
