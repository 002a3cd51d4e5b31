"""Nearest neighbours and logistic regression in float64, written for clarity: loops, and Newton's method.

n images, B queries, F features, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def vote(  # noqa: PLR0917 (a problem)
    x_nF: Tensor, labels_n: Tensor, weights_n: Tensor, q_BF: Tensor, classes: int, k: int, temperature: float | None
) -> Tensor:
    """The classes' shares of the votes of the k training images with the largest cosine, [B, K]."""
    shares = torch.zeros(len(q_BF), classes, dtype=torch.float64)
    for b, query in enumerate(q_BF):
        cosines = [float(query @ x / query.norm() / x.norm()) for x in x_nF]
        nearest = sorted(range(len(x_nF)), key=lambda i: -cosines[i])[:k]
        for i in nearest:
            weight = 1.0 if temperature is None else float(torch.tensor(cosines[i] / temperature).double().exp())
            shares[b, labels_n[i]] += weight * weights_n[i]
    return shares / shares.sum(1, keepdim=True)


def objective(  # noqa: PLR0917 (a problem)
    theta: Tensor, x_nF: Tensor, labels_n: Tensor, c: float, weights_n: Tensor, smoothing: float = 0.0
) -> Tensor:
    """theta [K, F + 1], the bias last: scikit-learn's objective over C, with weights of images."""
    losses_n = F.cross_entropy(
        x_nF @ theta[:, :-1].mT + theta[:, -1], labels_n, reduction="none", label_smoothing=smoothing
    )
    penalty = theta[:, :-1].square().sum() / (2 * c)
    return (losses_n * weights_n).sum() + penalty * (2 if len(theta) == 2 else 1)


def newton(  # noqa: PLR0917 (a problem)
    x_nF: Tensor, labels_n: Tensor, classes: int, c: float, weights_n: Tensor, smoothing: float = 0.0
) -> float:
    """The least value of the objective, by Newton's method with a halved step where it does not fall."""
    theta = torch.zeros(classes, x_nF.shape[1] + 1, dtype=torch.float64)

    def value(flat: Tensor) -> Tensor:
        return objective(flat.view_as(theta), x_nF, labels_n, c, weights_n.double(), smoothing)

    flat = theta.flatten()
    for _ in range(200):
        now = value(flat)
        [gradient] = torch.autograd.functional.jacobian(value, (flat,))
        hessian = torch.autograd.functional.hessian(value, flat)
        # Equal biases for all classes change nothing: along that direction the Hessian is 0, and so is the step.
        step = torch.linalg.pinv(hessian, hermitian=True, rtol=1e-12) @ gradient
        size = 1.0
        while value(flat - size * step) > now and size > 1e-10:
            size /= 2
        flat = flat - size * step
        if float(gradient @ step) < 1e-13 * float(now):
            break
    return float(value(flat))
