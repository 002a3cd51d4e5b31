"""Opening image files: RGB pixels, or a DataError that names the file."""

import threading
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dist_vpt.errors import DataError

_opening = threading.Lock()


def decode(
    source: str | Path | bytes, where: str, max_megapixels: float = 178.0, exif_transpose: bool = False
) -> Image.Image:
    """The RGB picture in a file or in encoded bytes; ``where`` names it in messages.

    ``exif_transpose`` turns the picture by its EXIF orientation; the published VTAB and FGVC loaders do not.
    """
    try:
        image = _open(source)
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such image; restore the file or remove its entry") from None
    except Exception as error:  # decoders raise errors of any kind for damaged files
        raise DataError(unreadable(where, error)) from error
    with image:
        refuse_large(*image.size, where, max_megapixels)
        try:
            image.load()
            return _rgb(ImageOps.exif_transpose(image) if exif_transpose else image)
        except Exception as error:
            raise DataError(unreadable(where, error)) from error


def refuse_large(width: int, height: int, where: str, max_megapixels: float) -> None:
    """Raise a DataError for an image that is too large to be decoded."""
    if width * height > max_megapixels * 1e6:
        raise DataError(
            f"{where}: {width} x {height} pixels are {width * height / 1e6:.1f} megapixels; at most "
            f"{max_megapixels:g} are decoded; shrink the image or raise data.max_megapixels"
        )


def unreadable(where: str, error: Exception) -> str:
    """The message about an image that cannot be decoded."""
    return (
        f"{where}: the image cannot be read ({type(error).__name__}: {error}); "
        f"replace the file, or set data.on_decode_error=skip"
    )


def _open(source: str | Path | bytes) -> Image.Image:
    """Read only the header, without Pillow's limit on pixels: data.max_megapixels is checked instead."""
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit gray: Pillow would clip it at 255, so keep the high byte
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit pixels have no agreed range, save the image with 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the palette's colors, without Pillow's warning
    return image.convert("RGB")
