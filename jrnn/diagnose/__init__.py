"""Why training fails or works: how gradients travel through time, measured on real parameters and a real batch.

- `gradient_norms` measures how much of the loss's gradient reaches the state of every step.
- `jacobian_products` shows why: it measures the products of the steps' Jacobians, and the bounds that they obey.
- `gate_saturation` finds the gates that have stopped passing gradients.
- `lyapunov` estimates the largest Lyapunov exponent: whether the state forgets where it began, or the run is chaotic.
- `newton` reports what Newton's method over the whole sequence (``backend="newton"``) does: whether it converges.

Each returns NumPy arrays, and all but the last have a plot.

Shared arguments:
  model, params, xs, state, lengths, mask, resets, reverse, key: as for `jrnn.unroll`. All measurements are NaN at steps
    that are not valid.
  layer: the recurrent layer to measure: an index into a stack, "forward" or "backward" for a direction of a
    bidirectional layer, or a tuple of these from the outside in, such as ``(1, "forward")``. A combinator of one layer,
    such as `jrnn.residual`, `jrnn.highway` or one of your own, takes no place in the tuple. A combinator of your own
    with several layers is indexed by its ``children()``. None if there is only one recurrent layer. The layers below
    the chosen one compute its inputs, and the gradient reaches it through the layers above.

None of these functions can be called inside jit, since their results leave the device.

T time, B batch (any number of leading axes, or none), F input features, H hidden features, N numbers in a state.
"""

from __future__ import annotations

from jrnn.diagnose.convergence import Newton, newton
from jrnn.diagnose.exponents import Lyapunov, lyapunov, plot_lyapunov
from jrnn.diagnose.jacobians import JacobianProducts, jacobian_products, plot_jacobian_products
from jrnn.diagnose.norms import GradientNorms, gradient_norms, plot_gradient_norms
from jrnn.diagnose.saturation import GateSaturation, gate_saturation, plot_gate_saturation

__all__ = [
    "GateSaturation",
    "GradientNorms",
    "JacobianProducts",
    "Lyapunov",
    "Newton",
    "gate_saturation",
    "gradient_norms",
    "jacobian_products",
    "lyapunov",
    "newton",
    "plot_gate_saturation",
    "plot_gradient_norms",
    "plot_jacobian_products",
    "plot_lyapunov",
]
