"""Whether an exported file gives the logits of its run.

b images of a check, H, W height and width of a picture, S side of an image, K classes.

The pictures are noise, and the run sees them through the transform that evaluation uses, so that what a file does
itself of the preprocessing is compared with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vpt.data.joined import Joined
from dist_vpt.errors import UserError
from dist_vpt.inference.tuned import Tuned
from dist_vpt.methods.base import Method

TOLERANCE = 1e-4  # of a logit, and where they are larger than 1 of the largest
Arrays = list[np.ndarray]  # a file's inputs, in their order


@dataclass(frozen=True)
class Check:
    """A file's inputs for some numbers of images, and the logits [b, K] of the run."""

    inputs: tuple[Arrays, ...]
    expected: tuple[np.ndarray, ...]
    example: tuple[Tensor, ...]  # inputs of other sizes, with which a computation is recorded

    def compare(self, run: Callable[[Arrays], np.ndarray]) -> str:
        """A text about the difference. Raises UserError where it is larger than rounding."""
        difference, largest = self._difference(run)
        allowed = TOLERANCE * max(1.0, largest)
        if not difference <= allowed:  # nor is NaN
            raise UserError(
                f"the exported file gives other logits than the run: they differ by up to {difference:.2g} (at most "
                f"{allowed:.2g} is rounding), so that it was not written; use another --format"
            )
        return f"logits differ from the run's by at most {difference:.1e}"

    def report_quantized(self, run: Callable[[Arrays], np.ndarray]) -> str:
        """A text about a difference that is expected. Raises UserError where logits are not finite."""
        difference, largest = self._difference(run)
        if not np.isfinite(difference):
            raise UserError("--quantize int8: logits are not finite, so that it was not written; leave it out")
        return f"int8: logits of noise differ from the run's by at most {difference:.2g} (the largest is {largest:.2g})"

    def _difference(self, run: Callable[[Arrays], np.ndarray]) -> tuple[float, float]:
        """The largest difference, and the largest number."""
        found = [
            float(np.abs(run(arrays) - logits_bK).max())
            for arrays, logits_bK in zip(self.inputs, self.expected, strict=True)
        ]
        return max(found), max(float(np.abs(logits_bK).max()) for logits_bK in self.expected)


@torch.no_grad()
def make_check(loaded: Tuned, inside: str, batches: Sequence[int]) -> Check:
    """Inputs of a file with this of the preprocessing inside, for these numbers of images, and the run's logits."""
    size, draw, most = loaded.inputs.transform.image_size, np.random.default_rng(0), max(batches)
    height, width = (2 * size + 5, size + 9) if inside == "resize" else (size, size)
    pictures = draw.integers(0, 256, (most, height, width, 3), np.uint8)
    pixels = [torch.stack([t.eval(picture) for picture in pictures]) for t in loaded.inputs.transforms]
    if inside == "resize":
        arrays = [np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))]
    elif inside == "normalize":
        arrays = [images.numpy() for images in pixels]
    else:
        members = loaded.method.backbone.members
        arrays = [member.normalized(images).numpy() for member, images in zip(members, pixels, strict=True)]
    expected = [logits_of(loaded.method, [images.numpy()[:count] for images in pixels]) for count in batches]
    count = min(most, 2)  # a dynamic number must not be recorded as 1
    if inside == "resize":
        example = [torch.zeros(count, 3, size + 13, size + 29, dtype=torch.uint8)]
    else:
        example = [torch.from_numpy(array[:count].copy()) for array in arrays]
    return Check(tuple([array[:n] for array in arrays] for n in batches), tuple(expected), tuple(example))


@torch.no_grad()
def logits_of(method: Method, arrays: Arrays) -> np.ndarray:
    """A method's logits [b, K] of images [b, 3, S, S], or of those of each backbone."""
    device = next(method.backbone.parameters()).device
    images = tuple(torch.from_numpy(array).to(device) for array in arrays)
    return method(images[0] if len(images) == 1 else Joined(images)).float().cpu().numpy()
