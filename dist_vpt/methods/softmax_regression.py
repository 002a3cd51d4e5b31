"""Multinomial logistic regression for many strengths of its penalty at once, by L-BFGS.

n images, F features, K classes, T values of C, r directions in which features vary (and one for the bias), m pairs.

For each C this minimizes over W [K, F] and b [K]

    sum over images i of v_i (logsumexp(z_i) - z_i[label_i]) + |W|^2 / (2 C),    z_i = W x_i + b

with weights v_i: scikit-learn's LogisticRegression divided by its C. Two classes have one vector of weights there; as
here W is half of it in each class with opposite signs, their penalty is doubled to give the same optimum.

All is float64. Features are turned onto their principal axes, where the Hessian at W = 0 is diagonal, and scaled by it:
that is the preconditioner, until most images are certain; then it is the Hessian's block of each class, made anew every
100 iterations. Logits are linear along a direction, so that a line search costs no product of matrices;
and directions are combinations of rows whose products are known (Chen et al., vector-free L-BFGS, NeurIPS 2014).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PAIRS = 10  # m: remembered steps and changes of the gradient
TOLERANCE = 1e-7  # of half the Newton decrement (an estimate of what is left to gain), relative to the objective
MAX_ITERATIONS = 1000  # as the linear evaluation of DINOv2 (arXiv 2304.07193) gives its solver
REFRESH = 100  # iterations between two preconditioners
JITTER = 1e-5  # of a block's mean diagonal, on its diagonal: blocks are float32
BLOCKS_BELOW = 0.2  # share of the curvature at W = 0: where less is left, the preconditioner has blocks
BUDGET = 2**27  # numbers that are held at once beside the features: 1 GiB in float64
OF_LOGITS = 6  # tensors [n, K] for each C: in a line search both ends' logits and residuals, the direction's, margins
OF_WEIGHTS = 2 * (2 * PAIRS + 1) + 8  # tensors [K, r] for each C: the memory, once more while it forgets, and steps
OF_BLOCKS = 2  # tensors [K, r, r] for each C, in float32 4: the blocks, once more while some are forgotten, factors
FIRST_STRIDE = 8  # of the values of C that are solved first


@dataclass(frozen=True)
class Solution:
    """The optimum for each C, in the order in which they were given."""

    weight_TKF: Tensor  # float64, on the device of the features
    bias_TK: Tensor
    objective_T: Tensor
    iterations: tuple[int, ...]

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the values of C that the limit of iterations ended."""
        return [t for t, iterations in enumerate(self.iterations) if iterations >= MAX_ITERATIONS]


def solve_path(  # noqa: PLR0917 (a regression)
    features_nF: Tensor,
    labels_n: Tensor,
    classes: int,
    c_T: list[float],
    weights_n: Tensor,
    smoothing: float = 0.0,
    raise_on_stop: Callable[[], None] = lambda: None,
) -> Solution:
    """Solve for every C: first for each eighth of them in order, then for those between, from their neighbours' optima.

    Each such set is one batch. ``labels_n``: int64 below ``classes``, at least two of which must occur; a class that
    does not has weight 0 and the bias -1000. ``smoothing``: share of the target that is spread over the classes that
    occur. ``raise_on_stop``: called before each iteration; what it raises ends the work.
    """
    present = labels_n.unique()  # ascending
    problem = _Problem(features_nF, torch.searchsorted(present, labels_n), len(present), weights_n, smoothing)
    order = sorted(range(len(c_T)), key=lambda t: c_T[t])
    theta: dict[int, Tensor] = {}  # of those that are solved: [K, r] by number in that order
    objective, iterations = [0.0] * len(c_T), [0] * len(c_T)
    for group in _groups(len(order), max(1, BUDGET // problem.numbers)):
        values = [c_T[order[at]] for at in group]
        starts = [_between(at, theta, [math.log(c_T[t]) for t in order]) for at in group]
        found, objective_t, iterations_t = _minimize(problem, values, problem.zeros(starts), raise_on_stop)
        for row, at in enumerate(group):
            theta[at] = found[row]
            objective[order[at]], iterations[order[at]] = float(objective_t[row]), int(iterations_t[row])
    solved = torch.stack([theta[order.index(t)] for t in range(len(c_T))])
    weight, bias = problem.unturned(solved)
    weight_TKF = weight.new_zeros(len(c_T), classes, features_nF.shape[1])
    bias_TK = bias.new_full((len(c_T), classes), -1000.0)
    weight_TKF[:, present], bias_TK[:, present] = weight, bias
    return Solution(weight_TKF, bias_TK, torch.tensor(objective, dtype=torch.float64), tuple(iterations))


def _groups(number: int, most: int) -> Iterator[list[int]]:
    """The numbers below ``number``, at most so many at once: coarse ones first, those between them after that."""
    stride, done = FIRST_STRIDE, set[int]()
    while stride:
        new = [at for at in range(0, number, stride) if at not in done]
        done.update(new)
        for start in range(0, len(new), most):
            yield new[start : start + most]
        stride //= 2


def _between(at: int, theta: dict[int, Tensor], log_c: list[float]) -> Tensor | None:
    """What a C starts from: between the optima of its solved neighbours, or that of the only one."""
    below = max((other for other in theta if other < at), default=None)
    above = min((other for other in theta if other > at), default=None)
    if below is None or above is None:
        near = below if above is None else above
        return None if near is None else theta[near]
    width = log_c[above] - log_c[below]
    share = (log_c[at] - log_c[below]) / width if width else 0.0
    return torch.lerp(theta[below], theta[above], share)


class _Problem:
    """The images on the principal axes of their features. theta [T, K, r]: weights on these axes, and the bias."""

    def __init__(self, features_nF: Tensor, labels_n: Tensor, classes: int, weights_n: Tensor, smoothing: float):
        features_nF, self.weights_n1 = features_nF.double(), weights_n.double()[:, None]
        self.labels_n, self.classes, self.smoothing = labels_n, classes, smoothing
        self.mean_F = (features_nF * self.weights_n1).sum(0) / self.weights_n1.sum()
        centered_nF = features_nF - self.mean_F
        variances, axes = torch.linalg.eigh(centered_nF.mT @ (centered_nF * self.weights_n1))
        varies = variances > 1e-12 * variances[-1].clamp_min(1e-300)
        self.axes_Fr = axes[:, varies]
        self.rows_nr = torch.cat([centered_nF @ self.axes_Fr, torch.ones_like(self.weights_n1)], 1)
        total = self.weights_n1.sum()[None]
        self.curvature_r = torch.cat([variances[varies], total]) / classes  # of the loss where all are equally likely
        images, directions = self.rows_nr.shape
        self.numbers = classes * (OF_LOGITS * images + OF_WEIGHTS * directions)  # that are held for each C, at most
        of_blocks = OF_BLOCKS * classes * directions**2
        self.has_blocks = self.numbers + of_blocks <= BUDGET
        self.numbers += of_blocks if self.has_blocks else 0

    def zeros(self, starts: list[Tensor | None]) -> Tensor:
        """[T, K, r]: the starts, 0 where there is none."""
        zero = self.rows_nr.new_zeros(self.classes, self.rows_nr.shape[1])
        return torch.stack([zero if start is None else start for start in starts])

    def ridge(self, values: list[float]) -> Tensor:
        """Twice the factor of the penalty of each number of theta, [T, 1, r]; the bias has none."""
        penalty_T = (2.0 if self.classes == 2 else 1.0) / torch.tensor(values, dtype=torch.float64)
        ridge_T1r = penalty_T.to(self.rows_nr.device)[:, None, None].repeat(1, 1, self.rows_nr.shape[1])
        ridge_T1r[..., -1] = 0.0
        return ridge_T1r

    def logits(self, theta_TKr: Tensor) -> Tensor:
        """[T, n, K]."""
        return (theta_TKr @ self.rows_nr.mT).mT.contiguous()

    def losses(self, logits_TnK: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over images, [T], and its derivative by the logits, [T, n, K].

        By the logits minus the label's: where a class is certain, 1 - p and the loss would else be rounding errors.
        """
        at = self.labels_n.expand(len(logits_TnK), -1).unsqueeze(2)
        margins = logits_TnK - logits_TnK.gather(2, at)
        largest = margins.amax(2, keepdim=True)  # at least the label's 0
        residuals = (margins - largest).exp_()
        total = residuals.sum(2, keepdim=True)
        losses_Tn1 = largest + total.log()
        residuals.div_(total).scatter_add_(2, at, torch.full_like(losses_Tn1, self.smoothing - 1.0))
        if self.smoothing:
            losses_Tn1 = losses_Tn1 - self.smoothing * margins.mean(2, keepdim=True)
            residuals -= self.smoothing / self.classes
        return (losses_Tn1 * self.weights_n1).sum((1, 2)), residuals.mul_(self.weights_n1)

    def unturned(self, theta_TKr: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, K, F] and biases [T, K] for the features as they were given."""
        weight_TKF = theta_TKr[..., :-1] @ self.axes_Fr.mT
        return weight_TKF, theta_TKr[..., -1] - weight_TKF @ self.mean_F


def _minimize(
    p: _Problem, values: list[float], start_TKr: Tensor, raise_on_stop: Callable[[], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """The optima [T, K, r] for some values of C together, their objectives [T] and iterations [T]."""
    ridge = p.ridge(values)
    found, objective_T = start_TKr.clone(), torch.zeros(len(values), dtype=torch.float64)
    iterations_T = torch.full((len(values),), MAX_ITERATIONS)
    active = torch.arange(len(values))  # rows of those that are not done yet
    theta, logits = start_TKr, p.logits(start_TKr)
    loss, residuals = p.losses(logits)
    value, gradient = loss + _dot(ridge * theta, theta) / 2, residuals.mT @ p.rows_nr + ridge * theta
    del residuals
    for iteration in range(MAX_ITERATIONS):
        raise_on_stop()
        if iteration % REFRESH == 0:
            scale = _Scale(p, ridge, logits)
            memory = _Memory(scale.turned(gradient))
        direction, slope = memory.direction()
        done = ~(-slope / 2 > TOLERANCE * value)  # also where a number is not finite
        if done.any():
            rows, stays = active[done.cpu()], ~done
            found[rows], objective_T[rows] = theta[done], value[done].cpu()
            iterations_T[rows] = iteration
            active = active[stays.cpu()]
            if not len(active):
                break
            memory.keep(stays)
            scale.keep(stays)
            theta, ridge, logits, value, direction, slope = (
                each[stays] for each in (theta, ridge, logits, value, direction, slope)
            )
        ahead = scale.unturned(direction)
        step_T11, logits, value, residuals = _search(p, theta, ahead, ridge, logits, p.logits(ahead), value, slope)
        theta = theta + step_T11 * ahead
        gradient = residuals.mT @ p.rows_nr + ridge * theta
        del residuals
        memory.add(step_T11 * direction, scale.turned(gradient))
    if len(active):
        found[active], objective_T[active] = theta, value.cpu()
    return found, objective_T, iterations_T


class _Scale:
    """The preconditioner: L, of which L L' is close to the Hessian of each class, by its diagonal or whole.

    The diagonal is that at W = 0. Once most images are certain, little is left of it, and what is left differs from
    class to class: there each class has the block of its own weights, r x r, as it is at these logits.
    """

    def __init__(self, p: _Problem, ridge_T1r: Tensor, logits_TnK: Tensor):
        self.diagonal_T1r = (p.curvature_r + ridge_T1r).rsqrt()
        self.blocks_TKrr: Tensor | None = None
        if not p.has_blocks:
            return
        likely_TnK = logits_TnK.softmax(2)
        curvature_TnK = likely_TnK.mul_(1 - likely_TnK).mul_(p.weights_n1)
        at_zero = p.weights_n1.sum() * (1 - 1 / p.classes)
        if (curvature_TnK.sum((1, 2)) < BLOCKS_BELOW * at_zero).any():
            size = (len(logits_TnK), p.classes, p.rows_nr.shape[1], p.rows_nr.shape[1])
            self.blocks_TKrr = torch.empty(size, dtype=torch.float32, device=logits_TnK.device)
            each = zip(self.blocks_TKrr, ridge_T1r, self.diagonal_T1r, curvature_TnK, strict=True)
            for blocks_Krr, ridge_1r, diagonal_1r, curvature_nK in each:
                self._factor(p.rows_nr * diagonal_1r, ridge_1r * diagonal_1r.square(), curvature_nK, blocks_Krr)

    @staticmethod
    def _factor(rows_nr: Tensor, ridge_1r: Tensor, curvature_nK: Tensor, out_Krr: Tensor) -> None:
        """Cholesky factors [K, r, r] of the blocks for one C, in numbers that the diagonal has scaled."""
        for curvature_n, block_rr in zip(curvature_nK.unbind(1), out_Krr, strict=True):
            counts = curvature_n > 1e-6 * curvature_n.max()  # the others are certain
            rows_mr = (rows_nr[counts] * curvature_n[counts, None].sqrt()).float()
            torch.mm(rows_mr.mT, rows_mr, out=block_rr)
        own_Kr = out_Krr.diagonal(dim1=1, dim2=2)
        own_Kr += ridge_1r + JITTER * own_Kr.mean(1, keepdim=True) + 1e-30
        factors_Krr, failed_K = torch.linalg.cholesky_ex(out_Krr)
        plain_Krr = torch.diag_embed(own_Kr.sqrt())
        torch.where(failed_K[:, None, None] > 0, plain_Krr, factors_Krr, out=out_Krr)

    def turned(self, gradient_TKr: Tensor) -> Tensor:
        """A gradient by theta as one by what is minimized over."""
        gradient_TKr = gradient_TKr * self.diagonal_T1r
        if self.blocks_TKrr is None:
            return gradient_TKr
        column = gradient_TKr.float().unsqueeze(3)
        return torch.linalg.solve_triangular(self.blocks_TKrr, column, upper=False).squeeze(3).double()

    def unturned(self, step_TKr: Tensor) -> Tensor:
        """A step of what is minimized over as one of theta."""
        if self.blocks_TKrr is not None:
            column = step_TKr.float().unsqueeze(3)
            step_TKr = torch.linalg.solve_triangular(self.blocks_TKrr.mT, column, upper=True).squeeze(3).double()
        return step_TKr * self.diagonal_T1r

    def keep(self, stays_T: Tensor) -> None:
        """Forget the others."""
        self.diagonal_T1r = self.diagonal_T1r[stays_T]
        if self.blocks_TKrr is not None:
            self.blocks_TKrr = self.blocks_TKrr[stays_T]


def _search(  # noqa: PLR0917 (a point and a line)
    p: _Problem, x: Tensor, d: Tensor, ridge: Tensor, logits: Tensor, ahead: Tensor, value: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step sizes [T, 1, 1] that lower the objective enough (Armijo), and logits, objective and residuals there."""
    xx, xd, dd = _dot(ridge * x, x), _dot(ridge * x, d), _dot(ridge * d, d)
    step_T = torch.ones_like(value)
    for _ in range(30):
        reached = torch.addcmul(logits, step_T[:, None, None], ahead)
        loss, residuals = p.losses(reached)
        new = loss + (xx + 2 * step_T * xd + step_T.square() * dd) / 2
        short = new > value + 1e-4 * step_T * slope + 1e-14 * value
        if not short.any():
            break
        parabola = -slope * step_T.square() / (2 * (new - value - slope * step_T))
        step_T = torch.where(short, parabola.clamp(0.1 * step_T, 0.5 * step_T), step_T)
    return step_T[:, None, None], reached, new, residuals


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2))


class _Memory:
    """The last m steps, changes of the gradient, and the gradient, as rows, and the products of all of them."""

    def __init__(self, gradient_TKr: Tensor):
        self.shape = gradient_TKr.shape
        rows = 2 * PAIRS + 1  # steps, changes, gradient
        self.rows = gradient_TKr.new_zeros(len(gradient_TKr), rows, gradient_TKr[0].numel())
        self.products = gradient_TKr.new_zeros(len(gradient_TKr), rows, rows)
        self.order: list[int] = []  # of the pairs, the oldest first
        self._put(-1, gradient_TKr)

    def add(self, step_TKr: Tensor, gradient_TKr: Tensor) -> None:
        """Remember a step and the gradient after it."""
        at = self.order.pop(0) if len(self.order) == PAIRS else len(self.order)
        self.order.append(at)
        change = gradient_TKr - self.rows[:, -1].view_as(gradient_TKr)
        for row, tensor in ((at, step_TKr), (PAIRS + at, change), (-1, gradient_TKr)):
            self._put(row, tensor)

    def keep(self, stays_T: Tensor) -> None:
        """Forget the others."""
        self.rows, self.products = self.rows[stays_T], self.products[stays_T]

    def direction(self) -> tuple[Tensor, Tensor]:
        """The direction of the next step [T, K, r], and its product with the gradient [T]: the two loops of L-BFGS."""
        part = torch.zeros_like(self.products[:, 0])  # of each row in the direction
        part[:, -1] = -1.0
        first: dict[int, Tensor] = {}
        for at in reversed(self.order):
            first[at] = self._share(part, at, at)
            part[:, PAIRS + at] -= first[at]
        if self.order:
            at = self.order[-1]
            size = self.products[:, at, PAIRS + at] / self.products[:, PAIRS + at, PAIRS + at]
            part *= torch.where(size > 0, size, 1.0)[:, None]
        for at in self.order:
            part[:, at] += first[at] - self._share(part, PAIRS + at, at)
        direction = torch.bmm(part[:, None], self.rows).view(-1, *self.shape[1:])
        return direction, (part * self.products[:, -1]).sum(1)

    def _share(self, part: Tensor, row: int, at: int) -> Tensor:
        """The product of the direction so far and a row, over that of a step and its change, where that is above 0."""
        curvature = self.products[:, at, PAIRS + at]
        return torch.where(curvature > 0, (part * self.products[:, row]).sum(1) / curvature, 0.0)

    def _put(self, row: int, tensor_TKr: Tensor) -> None:
        self.rows[:, row] = tensor_TKr.flatten(1)
        products = torch.bmm(self.rows, self.rows[:, row].unsqueeze(2)).squeeze(2)
        self.products[:, row], self.products[:, :, row] = products, products
