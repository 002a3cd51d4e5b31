"""Learning-rate multiplier: linear warm-up from 0, then half a cosine down to 0. Plain formula, no state."""

import math


def multiplier(epoch: float, warmup: float, epochs: float) -> float:
    """Factor on the base learning rate at a fractional epoch in 0..epochs.

    epoch / warmup while epoch < warmup, then 0.5 * (1 + cos(pi * (epoch - warmup) / (epochs - warmup))).
    """
    if not 0 <= warmup < epochs:
        raise ValueError(f"warmup {warmup} and epochs {epochs}; need 0 <= warmup < epochs")
    if not 0 <= epoch <= epochs:
        raise ValueError(f"epoch {epoch} is outside 0..{epochs}")
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def per_epoch(warmup: float, epochs: int) -> list[float]:
    """The multiplier of each epoch where it is set once per epoch, at the epoch's start."""
    return [multiplier(epoch, warmup, epochs) for epoch in range(epochs)]


def per_step(warmup: float, epochs: int, steps_per_epoch: int) -> list[float]:
    """The multiplier of each step where it follows the fraction of the epoch that is done."""
    return [multiplier(step / steps_per_epoch, warmup, epochs) for step in range(epochs * steps_per_epoch)]
