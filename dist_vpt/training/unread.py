"""What a step computed, on its way from the device, which computes the next step meanwhile.

Whoever waits for a number leaves the device without work until the next step reaches it. A step's numbers are
therefore copied when it is issued, and read when the next one is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dist_vpt.errors import Diverged
from dist_vpt.training.agreement import FLAGS
from dist_vpt.training.step import DIVERGED_FIX, Step, not_finite


class HostCopy:
    """Numbers on their way to the host. Reading them waits for what they were computed from, and for nothing later."""

    def __init__(self, numbers: Tensor):
        cuda = numbers.device.type == "cuda"
        # Into pinned memory: a copy into any other is waited for.
        self._numbers = torch.empty(numbers.shape, pin_memory=cuda).copy_(numbers, non_blocking=cuda)
        self._copied = torch.cuda.current_stream(numbers.device).record_event() if cuda else None

    def read(self) -> list[float]:
        """The numbers. Waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


@dataclass
class UnreadStep:
    """A step of a run that has been issued."""

    path: Path  # of the run, for messages
    epoch: int  # from 0
    step: int  # over the whole run, from 0
    lr: float
    checked: tuple[str, ...]  # numbers that must be finite
    # On the device, [] each: loss, correct, images and weight of the global batch, gradient norm if it is known, and on
    # logged steps the squares of the parameters' norm and of their update's.
    numbers: dict[str, Tensor] = field(default_factory=dict)
    flags: tuple[float, ...] = ()  # FLAGS, once they are read, where they are among the numbers
    _copy: HostCopy | None = None
    _read: Step | None = None

    @property
    def late(self) -> bool:
        """Whether its numbers tell what other processes report (training/agreement.py)."""
        return FLAGS[0] in self.numbers

    def send(self) -> "UnreadStep":
        """Start the copy of all numbers, in one."""
        self._copy = HostCopy(torch.stack(list(self.numbers.values())))
        return self

    def finite(self) -> Tensor:
        """Whether the numbers are finite that must be, bool []; on the device."""
        return torch.stack([self.numbers[name] for name in self._known()]).isfinite().all()

    def raise_if_diverged(self) -> None:
        """Read now what must be finite, and raise Diverged where it is not."""
        found = torch.stack([self.numbers[name] for name in self._known()]).tolist()
        self._raise_if_diverged(dict(zip(self._known(), found, strict=True)))

    def read(self) -> Step:
        """The metrics, read once from the device. Raises Diverged where a number is not finite that must be."""
        if self._read is None:
            assert self._copy is not None
            found = dict(zip(self.numbers, self._copy.read(), strict=True))
            self._raise_if_diverged(found)
            self.flags = tuple(found[name] for name in FLAGS if name in found)
            self._read = Step(
                loss=found["loss"] / found["weight"],
                correct=found["correct"],
                images=found["images"],
                lr=self.lr,
                gradient_norm=found.get("gradient norm"),
                parameter_norm=found["parameters"] ** 0.5 if "parameters" in found else None,
                update_norm=found["update"] ** 0.5 if "update" in found else None,
            )
        return self._read

    def _known(self) -> list[str]:
        return [name for name in self.checked if name in self.numbers]

    def _raise_if_diverged(self, found: Mapping[str, float]) -> None:
        for name in self._known():
            if reason := not_finite(name, found[name], self.step):
                error = Diverged(
                    f"{self.path}: {reason} (epoch {self.epoch}), before the optimizer step; {DIVERGED_FIX}"
                )
                error.shared = True  # of the global batch, so that all processes see it
                raise error
