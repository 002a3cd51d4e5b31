"""Trials whose trained tensors have equal shapes, trained as one model: one update for all of them.

T trials. Each trained tensor of all trials is one tensor [T, ...], and so is what the optimizer and, in fp16, the
gradient scale remember of it. A trial's reader and its ``state`` hold rows of these. Rates and decays are tensors [T],
and a trial that is not to be updated has a rate of 0: nothing is read from the device, and no trial touches another.

The updates are those of torch.optim.SGD, Adam (Kingma and Ba, ICLR 2015, arXiv 1412.6980, algorithm 1) and AdamW
(Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101, algorithm 2), and the gradient scale that of torch.amp.GradScaler.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vpt.methods.stack import RandomSource, ReaderStack, Sources, by_shape
from dist_vpt.recipe.schema import OptimConfig
from dist_vpt.training.optim import multiplier
from dist_vpt.training.step import fold_in
from dist_vpt.training.trial_state import Trial, exact_numbers

# Of the gradient scale in fp16, as torch.amp.GradScaler's.
GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000


class TrialStack:
    """The running trials of one group of shapes. Its trials' tensors become rows of the stack's."""

    def __init__(self, trials: Sequence[Trial], ended: Sequence[Trial] = ()):
        """``ended``: trials whose tensors may be rows of the same stack of before; they become their own.

        One tensor is moved after the other, so that of a stack of before, which nobody else holds, each is freed
        before the next is made: a trial that ends costs the memory of one tensor of all trials, not of all tensors.
        """
        self.trials = list(trials)
        self.optim: OptimConfig = trials[0].recipe.optim
        self.scales = trials[0].recipe.runtime.precision == "fp16"
        self.trained: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        for name, _ in trials[0].reader.trainable():
            _detach_parameter(ended, name)
            parameters = [trial.reader.get_parameter(name) for trial in trials]
            self.trained[name] = torch.stack([parameter.detach() for parameter in parameters]).requires_grad_()
            for t, parameter in enumerate(parameters):
                parameter.data = self.trained[name].detach()[t]
        for key in trials[0].state:
            _detach_state(ended, key)
            self.state[key] = torch.stack([trial.state[key] for trial in trials])
            for t, trial in enumerate(trials):
                trial.state[key] = self.state[key][t]
        self.readers = ReaderStack([trial.reader for trial in trials], self.trained)
        recipes = [trial.recipe for trial in trials]
        device = self.state["steps"].device
        self.peak_lr_T = exact_numbers([each.optim.peak_lr(each.train.batch_size) for each in recipes], device)
        self.decay_T = exact_numbers([each.optim.weight_decay for each in recipes], device)
        self.sound_T = torch.ones(len(trials), dtype=torch.bool, device=device)  # false once a trial has diverged
        self._sources: dict[int, list[RandomSource]] = {}  # by micro-batch, the same in all steps
        self.decays = any(each.optim.weight_decay for each in recipes)

    @property
    def scale_T(self) -> Tensor | None:
        """What losses are multiplied by before backward, in fp16 alone."""
        return self.state["scale"].float() if self.scales else None

    def seeded(self, step: int, rank: int, micro: int) -> Sources:
        """The sources of the trials' random numbers for one micro-batch of a process; None where none draws any."""
        if not any(trial.draws for trial in self.trials):
            return None
        if micro not in self._sources:
            device = self.state["steps"].device
            self._sources[micro] = [RandomSource(torch.Generator(device)) for _ in self.trials]
        for trial, source in zip(self.trials, self._sources[micro], strict=True):
            source.restart(fold_in(trial.recipe.seed, step, rank, micro))
        return self._sources[micro]

    def rate_factor(self, step: int, steps_per_epoch: int) -> Tensor:
        """What the schedule multiplies peak learning rates by in a step, counted from 0; [], on the device."""
        factor = multiplier(self.optim, step, steps_per_epoch, self.trials[0].recipe.train.epochs)
        return self.peak_lr_T.new_full((), factor)  # the number goes there with a kernel, which nobody waits for

    @property
    def gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in self.trained.values() if tensor.grad is not None]

    def forget_gradients(self) -> None:
        for tensor in self.trained.values():
            tensor.grad = None

    @torch.no_grad()
    def update(self, factor: Tensor, finite_T: Tensor) -> Tensor:
        """Clip and step every trial as it would be alone, and forget the gradients; returns the norms [T] before that.

        ``factor`` []: of the peak learning rates (``rate_factor``). ``finite_T`` [T] (bool): trials with a finite loss.
        The others are left as they are from now on, as are those whose norm is not finite; in fp16 these miss one
        step, and their gradient scale is lowered.
        """
        gradients = {name: tensor.grad for name, tensor in self.trained.items() if tensor.grad is not None}
        norm_T = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]).norm(dim=0)
        factor_T = torch.ones_like(norm_T)
        if self.scales:
            factor_T = factor_T / self.state["scale"].float()
            norm_T = norm_T * factor_T
        self.sound_T &= finite_T if self.scales else finite_T & norm_T.isfinite()
        alive_T = self.sound_T & norm_T.isfinite()
        if self.scales:
            self._rescale(norm_T)
        if self.optim.clip_norm is not None:
            factor_T = factor_T * (self.optim.clip_norm / (norm_T + 1e-6)).clamp_max(1.0)
        lr_T = self.peak_lr_T * factor * alive_T
        self.state["steps"] += alive_T
        for name, gradient in gradients.items():
            for row in _rows(gradient):
                ones = (-1, *[1] * (gradient.ndim - 1))
                own, alive = gradient[row], alive_T[row].view(ones)
                if self.scales or self.optim.clip_norm is not None:
                    own.mul_(factor_T[row].view(ones))
                own.masked_fill_(~alive, 0.0)  # 0 times a number that is not finite is none either
                self._step(name, row, own, lr_T[row].view(ones), alive)
            self.trained[name].grad = None  # freed at once: it may be large
        return norm_T

    def _step(self, name: str, row: slice, gradient: Tensor, lr: Tensor, alive: Tensor) -> None:
        """Update rows of one kind of tensors, in place; all have the dimensions of ``gradient`` [T, ...]."""
        optim, trained = self.optim, self.trained[name][row]
        # As build_optimizer: biases and norm scales are not decayed. A trial that is not alive has no gradient.
        if self.decays and gradient.ndim > 2:
            decay = self.decay_T[row].view_as(lr)
            if optim.name == "adamw":
                trained.mul_((1 - lr * decay).float())
            else:
                gradient.addcmul_(trained, (decay * alive).float())
        if optim.name == "sgd":
            if optim.momentum:
                momentum = self.state[f"momentum_buffer.{name}"][row]
                momentum.mul_(torch.where(alive, optim.momentum, 1.0)).add_(gradient)
                gradient = gradient.add_(momentum, alpha=optim.momentum) if optim.nesterov else momentum
            trained.addcmul_(gradient, (-lr).float())
            return
        first, second = optim.betas
        mean, square = self.state[f"exp_avg.{name}"][row], self.state[f"exp_avg_sq.{name}"][row]
        mean.lerp_(gradient, (1 - first) * alive)
        square.mul_(torch.where(alive, second, 1.0)).addcmul_(gradient, gradient, value=1 - second)
        steps = self.state["steps"][row].clamp_min(1).view_as(lr)
        root = square.sqrt().div_((1 - second**steps).sqrt().float()).add_(optim.eps)
        # The gradient is of no more use, and its memory holds the update.
        update = torch.mul(mean, (-lr / (1 - first**steps)).float(), out=gradient)
        trained.addcdiv_(update, root)

    def _rescale(self, norm_T: Tensor) -> None:
        scale, clean = self.state["scale"], self.state["clean_steps"]
        fine = norm_T.isfinite()
        grown = fine & (clean + 1 == GROWTH_INTERVAL)
        scale.mul_(torch.where(fine, torch.where(grown, GROWTH, 1.0), BACKOFF))
        clean.copy_(torch.where(fine & ~grown, clean + 1, 0.0))


def _rows(tensor_T: Tensor) -> list[slice]:
    """What is updated at once: on a CPU one trial, whose tensors its caches may hold, else all, in one launch."""
    if tensor_T.device.type != "cpu":
        return [slice(None)]
    return [slice(t, t + 1) for t in range(len(tensor_T))]


def stack_running(trials: Sequence[Trial]) -> list[TrialStack]:
    """The running trials in stacks. The tensors of the others become their own."""
    stacks = []
    for group in by_shape([trial.reader for trial in trials]):
        running, ended = ([trials[n] for n in group if trials[n].running is is_running] for is_running in (True, False))
        if running:
            stacks.append(TrialStack(running, ended))
            continue
        for name, _ in ended[0].reader.trainable():
            _detach_parameter(ended, name)
        for key in ended[0].state:
            _detach_state(ended, key)
    return stacks


def _detach_parameter(trials: Sequence[Trial], name: str) -> None:
    for trial in trials:
        parameter = trial.reader.get_parameter(name)
        parameter.data = _detached(parameter.detach())


def _detach_state(trials: Sequence[Trial], key: str) -> None:
    for trial in trials:
        trial.state[key] = _detached(trial.state[key])


def _detached(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own, in place of a row of a stack's."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
