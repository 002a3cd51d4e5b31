"""From a picture to pixels of one size: a part that never changes, and a part drawn per epoch.

H, W height and width of what is cut from; S side of the result. Normalisation is the backbone's.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dist_vpt.data.splits import Picture
from dist_vpt.data.tasks import Augment, Resize

KERNELS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Side of the crop -> length to which the shorter side is brought before it.
SHORTER_SIDES = {448: 512, 384: 438, 336: 384, 224: 256, 112: 128}


@dataclass(frozen=True)
class View:
    """How pictures are shown to the backbone."""

    image_size: int  # S, pixels
    interpolation: str  # bilinear or bicubic
    resize: Resize = "squash"  # squash: straight to a square; crop: shorter side, then a square of it
    augment: Augment = "none"  # fgvc: random crop and flip in training

    @property
    def shorter_side(self) -> int:
        """Pixels from which a square of ``image_size`` is cut."""
        return SHORTER_SIDES.get(self.image_size, round(self.image_size * 256 / 224))

    def fixed(self, picture: Picture, train: bool) -> np.ndarray:
        """The part that never changes, uint8: [S, S, 3], or [H, W, 3] where a random crop follows."""
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        size, shorter = self.image_size, self.shorter_side
        random = train and self.augment == "fgvc"
        if self.resize == "squash":
            side = shorter if random else size
            return np.asarray(self._resized(image, side, side))
        width, height = (shorter * length // min(image.size) for length in image.size)
        pixels_HW3 = np.asarray(self._resized(image, width, height))
        if random:
            return pixels_HW3
        return _cut(pixels_HW3, round((height - size) / 2), round((width - size) / 2), size)

    def varied(self, pixels_HW3: np.ndarray, train: bool, seed: int, epoch: int, index: int) -> np.ndarray:
        """The random part, a pure function of (seed, epoch, index): uint8 [S, S, 3]."""
        if not (train and self.augment == "fgvc"):
            return pixels_HW3
        height, width, _ = pixels_HW3.shape
        draws = np.random.PCG64(np.random.SeedSequence((seed, epoch, index))).random_raw(3)
        top = int(draws[0] % (height - self.image_size + 1))
        left = int(draws[1] % (width - self.image_size + 1))
        pixels_SS3 = _cut(pixels_HW3, top, left, self.image_size)
        return pixels_SS3[:, ::-1] if draws[2] >> 63 else pixels_SS3

    def train(self, picture: Picture, seed: int, epoch: int, index: int) -> torch.Tensor:
        """The picture as training sees it: uint8 [3, S, S]."""
        return _tensor(self.varied(self.fixed(picture, True), True, seed, epoch, index))

    def eval(self, picture: Picture) -> torch.Tensor:
        """The picture as evaluation sees it: uint8 [3, S, S]."""
        return _tensor(self.fixed(picture, False))

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), KERNELS[self.interpolation])


def _cut(pixels_HW3: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return pixels_HW3[top : top + size, left : left + size]


def _tensor(pixels_SS3: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels_SS3.transpose(2, 0, 1)))
