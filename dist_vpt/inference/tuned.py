"""A trained run as a module: images in, logits, classes, features and maps of attention out.

B images, S image side, K classes, F features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from dist_vpt.data.images import SKIP_HINT, Decoding, decode, to_rgb
from dist_vpt.data.joined import Joined
from dist_vpt.data.splits import Picture
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.errors import DataError, UserError
from dist_vpt.files import printable
from dist_vpt.inference.attention import Attention, attend, joined
from dist_vpt.inference.image_files import image_files
from dist_vpt.inference.named_classes import named_classes, probabilities_of
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import Recipe
from dist_vpt.training.inputs import Inputs

AnyImage = str | Path | Image.Image | np.ndarray | Tensor  # a file, or a picture


class PictureTransform(v2.Transform):
    """Pictures as the run was scored with: PIL images, or uint8 tensors [3, H, W], to [3, S, S] in 0..255.

    With ``data.test_crops`` to all views of a picture, [V, 3, S, S], of which the model averages the logits.

    What normalizes them is part of the model. Transparent pictures and EXIF orientation are treated as in the run's
    data. uint8, or float32 after the kernel ``vpt``.
    """

    def __init__(self, pixels: ImageTransform, decoding: Decoding):
        super().__init__()
        self.pixels, self.decoding = pixels, decoding

    def transform(self, inpt: Any, params: dict[str, Any]) -> Tensor:
        return self.pixels.eval(picture_of(inpt, self.decoding))

    def extra_repr(self) -> str:
        return f"{self.pixels}, {self.decoding}"


class Tuned(nn.Module):
    """A run's method with its adapters, in eval mode: transformed images [B, 3, S, S] to logits [B, K].

    ``recipe``: of the run. ``classes``: their names, in the order of the logits.
    ``thresholds``: of each class, where images have several labels; None where they have one.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        classes: list[str],
        inputs: Inputs,
        thresholds: Sequence[float] | None = None,
    ):
        super().__init__()
        self.recipe, self.method, self.classes, self.inputs = recipe, method, classes, inputs
        self.thresholds = thresholds
        self.eval()

    def forward(self, images: Any) -> Tensor:
        """Logits [B, K] float32 of images as ``transform`` gives them; of several backbones, of a ``Joined``."""
        return self.method(images)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.method.parameters()).device

    @property
    def transform(self) -> PictureTransform:
        """The transform of pictures, for ``torchvision.datasets`` and loaders of one's own.

        Raises UserError for a run with several backbones, which have one each (``transforms``).
        """
        if len(self.transforms) > 1:
            raise UserError("transform: this run has several backbones, each with its own; use transforms")
        return self.transforms[0]

    @property
    def transforms(self) -> tuple[PictureTransform, ...]:
        """The transform of each backbone."""
        decoding = Decoding.of(self.inputs.task)
        return tuple(PictureTransform(pixels, decoding) for pixels in self.inputs.transforms)

    @torch.no_grad()
    def predict(
        self, images: AnyImage | Sequence[AnyImage], top: int | None = None, temperature: float = 1.0
    ) -> list[dict[str, Any]]:
        """Classify pictures: files, folders of them, PIL images, uint8 arrays [H, W, 3] or tensors [3, H, W].

        Returns the same as ``dist-vpt predict --out FILE.json``: for each picture ``{"image": path or number,
        "predictions": [{"class": name, "probability": p}, ...]}``, the most likely first. ``top``: so many
        classes; None: 5, or where images have several labels all that reach their thresholds.
        ``temperature``: by which logits are divided, such as that of the run's result.
        Raises DataError for what cannot be read, before anything is computed for missing files.
        """
        if top is not None and top < 1:
            raise UserError(f"top = {top}: must be at least 1")
        rows = []
        for names, batch in self._batches(images):
            for name, row_K in zip(names, self.probabilities(batch, temperature), strict=True):
                best = named_classes(row_K, self.classes, top, self.thresholds)
                rows.append({"image": name, "predictions": best})
        return rows

    @torch.no_grad()
    def probabilities(self, images: Any, temperature: float = 1.0) -> Tensor:
        """Of each class, [B, K] float32 on the CPU, of transformed images: they sum to 1, or are each class's own."""
        return probabilities_of(self(images) / temperature, self.thresholds)

    @torch.no_grad()
    def features(self, images: AnyImage | Sequence[AnyImage]) -> Tensor:
        """What the head reads of pictures (see ``predict``), [B, F] float32 on the CPU: to search or cluster by."""
        found = [self.method.features(batch).float().cpu() for _, batch in self._batches(images, views=False)]
        return torch.cat(found)

    def attention(self, images: AnyImage | Sequence[AnyImage]) -> Attention:
        """How much the class token, and each prompt or query, attends to each patch of pictures (see ``predict``).

        Raises UserError for a run with several backbones, and for blocks whose attention cannot be read.
        """
        if len(self.transforms) > 1:
            raise UserError("attention: works with one backbone, and this run has several")
        with self._eager():
            return joined([attend(self.method, batch) for _, batch in self._batches(images, views=False)])

    def load_images(self, images: Sequence[AnyImage], *, views: bool = True) -> Any:
        """Pictures as the method's input, [B, 3, S, S] on its device; for several backbones ``Joined`` ones.

        ``views``: as many of each as the run was scored with (``data.test_crops``), [B, V, 3, S, S]; or one.
        """
        transforms = (self.inputs if views else self.inputs.one_view()).transforms
        pictures = [self._load_image(image, transforms) for image in images]
        of_each = [torch.stack(transformed).to(self.device) for transformed in zip(*pictures, strict=True)]
        return of_each[0] if len(of_each) == 1 else Joined(tuple(of_each))

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """Compute attention matrices in the open, whatever kernel was chosen."""
        backbone = self.method.backbone
        choosers: list[Any] = [module for module in backbone.modules() if hasattr(module, "fused_attn")]
        before, run_block = [module.fused_attn for module in choosers], backbone.run_block
        for module in choosers:
            module.fused_attn = False
        backbone.run_block = lambda block, tokens_BND: block(tokens_BND)
        try:
            yield
        finally:
            backbone.run_block = run_block
            for module, fused in zip(choosers, before, strict=True):
                module.fused_attn = fused

    def _batches(
        self, images: AnyImage | Sequence[AnyImage], *, views: bool = True
    ) -> Iterator[tuple[list[str | int], Any]]:
        """Names and transformed images of batches of ``train.eval_batch_size``, in eval mode."""
        named, size = list(_named(images)), self.recipe.train.eval_batch_size
        self.eval()
        for start in range(0, len(named), size):
            chunk = named[start : start + size]
            batch = self.load_images([image for _, image in chunk], views=views)
            yield [name for name, _ in chunk], batch

    def _load_image(self, image: AnyImage, transforms: Sequence[ImageTransform]) -> list[Tensor]:
        """A picture as each backbone's input, [3, S, S]."""
        decoding = Decoding.of(self.inputs.task)
        if not isinstance(image, str | Path):
            picture = picture_of(image, decoding)
            return [transform.eval(picture) for transform in transforms]
        try:
            picture = decode(image, printable(image), self.recipe.data.max_megapixels, decoding)
        except DataError as error:
            raise DataError(str(error).removesuffix(SKIP_HINT)) from error
        try:
            return [transform.eval(picture) for transform in transforms]
        except DataError as error:
            raise DataError(f"{printable(image)}: {error}") from error


def picture_of(image: Any, decoding: Decoding) -> Picture:
    """RGB pixels of a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]. Raises DataError."""
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image, decoding)
        except ValueError as error:
            raise DataError(f"a picture cannot be used: {error}") from error
    pixels = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else image
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3:
        return pixels
    about = f"{getattr(image, 'dtype', '')} {list(getattr(image, 'shape', ()))}"
    raise DataError(
        f"a picture is a {type(image).__name__} {about.strip()}: give a path, a PIL image, a uint8 array [H, W, 3] or "
        "a uint8 tensor [3, H, W], in 0..255"
    )


def _named(images: AnyImage | Sequence[AnyImage]) -> Iterator[tuple[str | int, AnyImage]]:
    """Each picture with its path, or its number in the sequence; folders give the image files in them."""
    one = isinstance(images, str | Path | Image.Image) or (hasattr(images, "ndim") and images.ndim == 3)
    for number, image in enumerate([images] if one else images):  # type: ignore[arg-type, list-item]
        if isinstance(image, str | Path):
            yield from ((printable(file), file) for file in image_files([str(image)]))
        else:
            yield number, image
