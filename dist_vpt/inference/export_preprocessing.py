"""The images of an exported file: what a run does before its backbone, as a part of the file.

B images, H, W height and width of a picture, S side of the backbone's images, O an output length, I an input length.

Pillow's resize is two products with matrices, along x and along y, whose weights it rounds to multiples of 2^-22; each
product is rounded to whole pixels. All of it is exact in float64, so that the exported resize equals Pillow's to the
last bit, for pictures of any size. (Pillow 13's: before it, none began along y.) The ``vpt`` resize gathers two
neighbors, in float32, as in ``data.transforms``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dist_vpt.data.joined import Joined
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.methods.base import Method

FIXED_POINT = 2.0**22  # of Pillow's weights for 8-bit pixels (Resample.c, PRECISION_BITS)


class ExportedModel(nn.Module):
    """A method as it is exported: images of each backbone, or pictures that it resizes itself -> logits [B, K].

    ``transforms``: those of the backbones, for pictures [B, 3, H, W]; empty where images come in their final size.
    """

    def __init__(self, method: Method, transforms: Sequence[ImageTransform] = ()):
        super().__init__()
        self.method = method
        self.resizes = nn.ModuleList(Resize(transform) for transform in transforms)

    def forward(self, *images: Tensor) -> Tensor:
        if self.resizes:
            images = tuple(resize(images[0]) for resize in self.resizes)
        return self.method(images[0] if len(images) == 1 else Joined(images))


def take_normalized(method: Method) -> None:
    """From now on the images are normalized before the method gets them."""
    for member in method.backbone.members:
        member.normalized = _as_it_is  # type: ignore[method-assign]


def _as_it_is(images_B3SS: Tensor) -> Tensor:
    return images_B3SS


class Resize(nn.Module):
    """Pictures [B, 3, H, W] (uint8) -> the images of evaluation [B, 3, S, S], float32 in 0..255."""

    def __init__(self, transform: ImageTransform):
        super().__init__()
        self.transform = transform

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        height, width = (torch.scalar_tensor(n, dtype=torch.float64) for n in pictures_B3HW.shape[2:])
        rows, columns = self._size_before_cut(height, width)
        if self.transform.interpolation == "vpt":
            pixels = _two_neighbors(pictures_B3HW.float(), 3, *self._nearest_two(width, columns))
            return _two_neighbors(pixels, 2, *self._nearest_two(height, rows))
        along_y_SH = self._weights(pictures_B3HW.shape[2], height, rows)
        along_x_WS = self._weights(pictures_B3HW.shape[3], width, columns).T
        shrinks = height - rows  # Pillow begins with the axis that leaves the other less to do
        y_first = (shrinks > 0) & (shrinks > 2 * (width - columns))
        operands = (pictures_B3HW.double(), along_y_SH, along_x_WS.contiguous())
        return torch.cond(y_first, _along_y_first, _along_x_first, operands).float()

    def _size_before_cut(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """``ImageTransform.size_before_cut`` of evaluation, [] each."""
        transform = self.transform
        if transform.crop_mode == "squash":
            side = torch.scalar_tensor(transform.image_size, dtype=torch.float64)
            return side, side
        shorter = torch.minimum(height, width)
        return tuple((transform.shorter_side * n / shorter).floor() for n in (height, width))  # type: ignore[return-value]

    def _positions(self, out: Tensor) -> Tensor:
        """The S positions that the cut leaves of ``out``, [S] float64."""
        first = ((out - self.transform.image_size) / 2).round()  # to even numbers from the middle, as Python's
        return torch.arange(self.transform.image_size, dtype=torch.float64) + first

    def _weights(self, size: int, length: Tensor, out: Tensor) -> Tensor:
        """Pillow's antialiased weights of a line's ``size`` pixels for each of its S outputs, [S, size]."""
        scale = length / out
        stretch = scale.clamp_min(1.0)
        centers_S1 = ((self._positions(out) + 0.5) * scale).unsqueeze(1)
        at_SI = (torch.arange(size, dtype=torch.float64) + 0.5 - centers_S1) / stretch
        kernel: Callable[[Tensor], Tensor] = {"bilinear": _triangle, "bicubic": _cubic}[self.transform.interpolation]
        weights_SI = kernel(at_SI.abs())
        weights_SI = weights_SI / weights_SI.sum(1, keepdim=True) * FIXED_POINT
        return weights_SI.sign() * (weights_SI.abs() + 0.5).floor() / FIXED_POINT

    def _nearest_two(self, length: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``transforms.nearest_two`` of the S positions that are cut."""
        position_S = self._positions(out).float() * (length / out).float()
        low_S = position_S.floor()
        high_S = torch.minimum(low_S + 1, (length - 1).float())
        return low_S.long(), high_S.long(), position_S - low_S


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_min(0)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, as Pillow has it."""
    a = -0.5
    inner = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    outer = (((distance - 5) * distance + 8) * distance - 4) * a
    return torch.where(distance < 1, inner, torch.where(distance < 2, outer, 0.0))


def _along_x_first(pixels_B3HW: Tensor, along_y_SH: Tensor, along_x_WS: Tensor) -> Tensor:
    return _to_whole(along_y_SH @ _to_whole(pixels_B3HW @ along_x_WS))


def _along_y_first(pixels_B3HW: Tensor, along_y_SH: Tensor, along_x_WS: Tensor) -> Tensor:
    return _to_whole(_to_whole(along_y_SH @ pixels_B3HW) @ along_x_WS)


def _to_whole(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor().clamp(0, 255)


def _two_neighbors(pixels: Tensor, dim: int, low_S: Tensor, high_S: Tensor, weight_S: Tensor) -> Tensor:
    low, high = pixels.index_select(dim, low_S), pixels.index_select(dim, high_S)
    return low + (high - low) * (weight_S if dim == 3 else weight_S.unsqueeze(1))
