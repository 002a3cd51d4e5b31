"""SGD, Adam, AdamW and global-norm clipping in plain NumPy float64, one tensor at a time.

A step takes (parameter, gradient, state) and returns (new parameter, new state) without changing its inputs.
The state of a parameter that was never updated is None.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """Running moments of one parameter."""

    step: int
    """Updates done so far."""
    first: Array
    """Decaying mean of the gradient."""
    second: Array
    """Decaying mean of the squared gradient."""


def sgd_step(
    param: Array,
    grad: Array,
    velocity: Array | None,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> tuple[Array, Array]:
    """g = grad + wd * p; v = momentum * v + g; p -= lr * v, or with Nesterov p -= lr * (g + momentum * v).

    The learning rate is outside the velocity, so a schedule acts on past gradients as well.
    """
    grad = grad + weight_decay * param
    velocity = grad if velocity is None else momentum * velocity + grad
    direction = grad + momentum * velocity if nesterov else velocity
    return param - lr * direction, velocity


def adam_step(
    param: Array,
    grad: Array,
    state: AdamState | None,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Array, AdamState]:
    """Adam (Kingma and Ba) with L2 regularization: the decay enters the gradient and so both moments."""
    state, direction = _adam_direction(grad + weight_decay * param, state, betas, eps)
    return param - lr * direction, state


def adamw_step(
    param: Array,
    grad: Array,
    state: AdamState | None,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Array, AdamState]:
    """AdamW (Loshchilov and Hutter): the decay bypasses the moments.

    The decayed amount is lr * wd * p, as in the common implementations; the paper multiplies the decay by the
    schedule's factor only and not by the base learning rate.
    """
    state, direction = _adam_direction(grad, state, betas, eps)
    return param - lr * weight_decay * param - lr * direction, state


def global_norm(grads: Mapping[str, Array]) -> float:
    """Euclidean norm of all gradients taken as one vector."""
    return math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))


def clip_by_global_norm(
    grads: Mapping[str, Array], max_norm: float, *, eps: float = 0.0
) -> tuple[dict[str, Array], float]:
    """(gradients scaled together so that their norm is at most `max_norm`, norm before scaling).

    eps is added to the norm in the factor; PyTorch uses 1e-6, the textbook 0.
    """
    norm = global_norm(grads)
    factor = min(1.0, max_norm / (norm + eps)) if norm > 0 else 1.0
    return {name: grad * factor for name, grad in grads.items()}, norm


def _adam_direction(
    grad: Array, state: AdamState | None, betas: tuple[float, float], eps: float
) -> tuple[AdamState, Array]:
    if state is None:
        state = AdamState(step=0, first=np.zeros_like(grad), second=np.zeros_like(grad))
    beta1, beta2 = betas
    step = state.step + 1
    first = beta1 * state.first + (1.0 - beta1) * grad
    second = beta2 * state.second + (1.0 - beta2) * grad**2
    # The moments start at zero; dividing by the sum of the weights given so far undoes that bias.
    unbiased_first = first / (1.0 - beta1**step)
    unbiased_second = second / (1.0 - beta2**step)
    direction = unbiased_first / (np.sqrt(unbiased_second) + eps)
    return AdamState(step=step, first=first, second=second), direction
