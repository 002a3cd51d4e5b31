"""Opening image files: RGB pixels, or a DataError that names the file."""

import contextlib
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from dist_vpt.data.tasks import Task
from dist_vpt.errors import DataError
from dist_vpt.files import first_bytes, looks_like

# Formats that Pillow knows by name and reads only with a program or a handler of its user's.
WITHOUT_READER = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

SKIP_HINT = ", or set data.on_decode_error=skip"  # of training alone

_opening = threading.Lock()

# Pillow's warning about damaged tags, which do not hinder decoding; it names no file. Set once: decoding has threads.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)


@dataclass(frozen=True)
class Decoding:
    """How encoded images become RGB; the defaults are those of the published VTAB and FGVC loaders."""

    exif: bool = False  # turn by the EXIF orientation
    background: tuple[int, ...] | None = None  # RGB, under what is transparent; None: the alpha channel is dropped

    @classmethod
    def of(cls, task: Task) -> "Decoding":
        """That of a task with the recipe's settings."""
        color = None if task.background == "none" else ImageColor.getrgb(task.background)
        return cls(task.exif == "transpose", color)


AS_PUBLISHED = Decoding()


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of the image formats that the installed Pillow reads, with its HEIF plugin if that is installed."""
    with contextlib.suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    found = Image.registered_extensions().items()
    names = {name for name, kind in found if kind in Image.OPEN and kind not in WITHOUT_READER}
    return frozenset({*names, ".mpo"})  # which Pillow opens as JPEG


def decode(
    source: str | Path | bytes, where: str, max_megapixels: float = 178.0, decoding: Decoding = AS_PUBLISHED
) -> Image.Image:
    """The RGB picture in a file or in encoded bytes; ``where`` names it in messages."""
    try:
        image = open_header(source)
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such image; restore the file or remove its entry") from None
    except Exception as error:  # decoders raise errors of any kind for damaged files
        raise DataError(unreadable(where, error, source)) from error
    with image:
        refuse_large(*image.size, where, max_megapixels)
        try:
            image.load()
            return to_rgb(image, decoding)
        except Exception as error:
            raise DataError(unreadable(where, error, source)) from error


def refuse_large(width: int, height: int, where: str, max_megapixels: float) -> None:
    """Raise a DataError for an image that is too large to be decoded."""
    if width * height > max_megapixels * 1e6:
        raise DataError(
            f"{where}: {width} x {height} pixels are {width * height / 1e6:.1f} megapixels; at most "
            f"{max_megapixels:g} are decoded; shrink the image or raise data.max_megapixels"
        )


def unreadable(where: str, error: Exception, source: str | Path | bytes | None = None) -> str:
    """The message about an image that cannot be decoded; ``source``: its file or its encoded bytes."""
    if isinstance(error, OSError) and error.strerror:
        return f"{where}: the image cannot be read ({error.strerror}); fix the file or its permissions{SKIP_HINT}"
    found = b"?" if source is None else source[:256] if isinstance(source, bytes) else first_bytes(source)
    if kind := looks_like(found):
        return f"{where}: the image cannot be read: {kind}{SKIP_HINT}"
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):  # which names the file a second time, or an address in memory
        reason = "its content is no image that Pillow knows"
    return f"{where}: the image cannot be read ({reason}); replace the file{SKIP_HINT}"


def open_header(source: str | Path | bytes) -> Image.Image:
    """Read only the header, without Pillow's limit on pixels: data.max_megapixels is checked instead."""
    image_extensions()  # registers the plugin
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def to_rgb(image: Image.Image, decoding: Decoding = AS_PUBLISHED) -> Image.Image:
    """A picture that is open, in RGB. Raises ValueError for pixels without an agreed range."""
    if decoding.exif:
        image = ImageOps.exif_transpose(image)
    background = decoding.background
    if image.mode.startswith("I;16"):  # 16-bit gray: Pillow would clip it at 255, so keep the high byte
        pixels_HW, transparent = np.asarray(image), image.info.get("transparency")
        if 0 < pixels_HW.max() < 256:
            raise ValueError("16-bit pixels of at most 255 would all be black, save the image with 8 bits")
        image = Image.fromarray((pixels_HW >> 8).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(pixels_HW == transparent, 0, 255).astype(np.uint8)))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit pixels have no agreed range, save the image with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")  # a palette's colors, too, without Pillow's warning
        if background is not None:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB")
