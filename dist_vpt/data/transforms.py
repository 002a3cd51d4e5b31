"""From a picture to pixels of one size: a part that never changes, and a part drawn per epoch.

H, W height and width of what is cut from; S side of the result; V views of an image in evaluation, of which several
are the mean of logits (``test_crops``). The backbone normalizes.

The ``vpt`` resize is float32. Where nothing is drawn, it never changes either, but its result is four times as large.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dist_vpt.data.rand_augment import rand_augmented
from dist_vpt.data.splits import Picture
from dist_vpt.data.tasks import Augment, CropMode, Interpolation
from dist_vpt.errors import DataError

KERNELS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MAX_RESIZED_MEGAPIXELS = 178  # as many as are decoded by default
# Side of the crop -> length to which the shorter side is brought before it.
SHORTER_SIDES = {448: 512, 384: 438, 336: 384, 224: 256, 112: 128}


@dataclass(frozen=True)
class ImageTransform:
    """How pictures become the backbone's input."""

    image_size: int  # S, pixels
    interpolation: Interpolation  # kernel
    crop_mode: CropMode = "squash"  # squash: straight to a square; crop: shorter side, then a square of it
    augment: Augment = "none"  # fgvc: random crop and flip in training
    rand_augment: str | None = None  # timm's policy, in training
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of the channels in [0, 1]: what RandAugment fills with
    test_crops: int = 1  # V: 1; 2: with the mirror image; 5: center and corners; 10: with mirror images

    @property
    def shorter_side(self) -> int:
        """Pixels from which a square of ``image_size`` is cut."""
        return SHORTER_SIDES.get(self.image_size, round(self.image_size * 256 / 224))

    @property
    def shown(self) -> dict[str, Any]:
        """How an image is shown to a frozen backbone, for files that hold what the backbone makes of it."""
        return {
            "image_size": self.image_size,
            "interpolation": self.interpolation,
            "crop_mode": self.crop_mode,
            "augment": self.augment,
        }

    @property
    def dtype(self) -> type[np.generic]:
        """Of the pixels that the backbone gets, which are in 0..255."""
        return np.float32 if self.interpolation == "vpt" else np.uint8

    def shape(self, train: bool) -> tuple[int, ...]:
        """Of the pixels of an image: [3, S, S], or of several views [V, 3, S, S]."""
        views = () if train or self.test_crops == 1 else (self.test_crops,)
        return (*views, 3, self.image_size, self.image_size)

    def fixed(self, picture: Picture, train: bool) -> np.ndarray:
        """The part that never changes, uint8: [S, S, 3], or [H, W, 3] where a vpt resize or random crop follows.

        Raises DataError for a strip that would need too much memory.
        """
        rows, columns = picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
        height, width = self.size_before_cut(rows, columns, train)
        _refuse_strip(rows, columns, height, width)
        if self.interpolation == "vpt":
            return np.asarray(picture)
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        pixels_HW3 = np.asarray(image.resize((width, height), KERNELS[self.interpolation]))
        return pixels_HW3 if self.cuts_later(train) else _center_crop(pixels_HW3, self.image_size)

    def varied(self, pixels_HW3: np.ndarray, train: bool, seed: int, epoch: int, index: int) -> np.ndarray:
        """The rest, random as a pure function of (seed, epoch, index): [S, S, 3] of ``dtype``, or [V, S, S, 3]."""
        if self.interpolation == "vpt":
            height, width, _ = pixels_HW3.shape
            pixels_HW3 = vpt_resize(pixels_HW3, *self.size_before_cut(height, width, train))
        if not train and self.test_crops > 1:
            return np.stack(_views(pixels_HW3, self.image_size, self.test_crops))
        if self.crops(train):
            height, width, _ = pixels_HW3.shape
            top, left, flip = self.drawn(height, width, seed, epoch, index)
            pixels_SS3 = _cut(pixels_HW3, top, left, self.image_size)
            pixels_SS3 = pixels_SS3[:, ::-1] if flip else pixels_SS3
        else:
            pixels_SS3 = _center_crop(pixels_HW3, self.image_size)
        if self.rand_augment is None or not train:
            return pixels_SS3
        whole = np.rint(pixels_SS3) if self.interpolation == "vpt" else pixels_SS3  # Pillow has 8 bits
        pixels_SS3 = np.ascontiguousarray(whole, np.uint8)
        return rand_augmented(pixels_SS3, self.rand_augment, self.mean, seed, epoch, index).astype(self.dtype)

    def drawn(self, height: int, width: int, seed: int, epoch: int, index: int) -> tuple[int, int, bool]:
        """Top and left of the square that is cut from [height, width], and whether it is flipped."""
        draws = np.random.PCG64(np.random.SeedSequence((seed, epoch, index))).random_raw(3)
        top = int(draws[0] % (height - self.image_size + 1))
        left = int(draws[1] % (width - self.image_size + 1))
        return top, left, bool(draws[2] >> 63)

    def train(self, picture: Picture, seed: int, epoch: int, index: int) -> torch.Tensor:
        """The picture transformed for training: [3, S, S] of ``dtype``."""
        return _tensor(self.varied(self.fixed(picture, True), True, seed, epoch, index))

    def eval(self, picture: Picture) -> torch.Tensor:
        """The picture transformed for evaluation: [3, S, S] of ``dtype``, or [V, 3, S, S]."""
        return _tensor(self.varied(self.fixed(picture, False), False, 0, 0, 0))

    def draws(self, train: bool) -> bool:
        """Whether a part is drawn anew in each epoch."""
        return self.crops(train) or (train and self.rand_augment is not None)

    def crops(self, train: bool) -> bool:
        """Whether a square is drawn in each epoch, and a flip."""
        return train and self.augment == "fgvc"

    def cuts_later(self, train: bool) -> bool:
        """Whether more of the picture is kept than the square in its middle, for what is cut of it."""
        return self.crops(train) or (not train and self.test_crops > 2)

    def size_before_cut(self, height: int, width: int, train: bool) -> tuple[int, int]:
        """Height and width to which a picture of this size is brought."""
        if self.crop_mode == "squash":
            side = self.shorter_side if self.cuts_later(train) else self.image_size
            return side, side
        shorter = min(height, width)
        return self.shorter_side * height // shorter, self.shorter_side * width // shorter


def _refuse_strip(height: int, width: int, resized_height: int, resized_width: int) -> None:
    """Raises DataError for a strip whose longer side outgrows the memory where its shorter one is brought to size."""
    if resized_height * resized_width > MAX_RESIZED_MEGAPIXELS * 1e6:
        raise DataError(
            f"{width} x {height} pixels would be resized to {resized_width} x {resized_height} before the crop; cut "
            "the image, or set data.crop_mode=squash"
        )


def vpt_resize(pixels_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """TensorFlow 1's bilinear resize, which the published VPT loader uses: float32 [height, width, 3].

    Source position = target position * in / out: no half-pixel centers, no antialiasing. First along x, then along y.
    """
    low_y, high_y, weight_y = nearest_two(pixels_HW3.shape[0], height)
    low_x, high_x, weight_x = nearest_two(pixels_HW3.shape[1], width)
    read, inverse = np.unique(np.concatenate([low_y, high_y]), return_inverse=True)
    rows_HW3 = pixels_HW3[read].astype(np.float32)
    left_HW3 = rows_HW3.take(low_x, axis=1)
    along_x_HW3 = left_HW3 + (rows_HW3.take(high_x, axis=1) - left_HW3) * weight_x[:, None]
    top_HW3 = along_x_HW3[inverse[:height]]
    return top_HW3 + (along_x_HW3[inverse[height:]] - top_HW3) * weight_y[:, None, None]


def nearest_two(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each target position the two source positions and the weight of the second, in float32 as in TensorFlow."""
    position = np.arange(out, dtype=np.float32) * np.float32(size / out)
    low = np.floor(position).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)


def _center_crop(pixels_HW3: np.ndarray, size: int) -> np.ndarray:
    height, width, _ = pixels_HW3.shape
    return _cut(pixels_HW3, round((height - size) / 2), round((width - size) / 2), size)


def _views(pixels_HW3: np.ndarray, size: int, views: int) -> list[np.ndarray]:
    """The center, with 5 and 10 views the corners, and with 2 and 10 views the mirror images of them."""
    height, width, _ = pixels_HW3.shape
    found = [_center_crop(pixels_HW3, size)]
    if views > 2:
        found += [_cut(pixels_HW3, top, left, size) for top in (0, height - size) for left in (0, width - size)]
    return [*found, *(pixels_SS3[:, ::-1] for pixels_SS3 in found if views % 2 == 0)]


def _cut(pixels_HW3: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return pixels_HW3[top : top + size, left : left + size]


def channels_first(pixels_SS3: np.ndarray) -> np.ndarray:
    """[3, S, S], or of several views [V, 3, S, S]."""
    return np.moveaxis(pixels_SS3, -1, -3)


def _tensor(pixels_SS3: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(channels_first(pixels_SS3)))
