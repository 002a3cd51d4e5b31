"""Decoding: what comes out, and what is reported of a file that cannot be decoded."""

import struct
import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.images import Decoding, decode
from dist_vpt.errors import DataError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode):
    image = RGB.convert(mode)
    picture = decode(encoded(image, "PNG"), "x")
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg():
    assert decode(encoded(RGB.convert("CMYK"), "JPEG"), "x").mode == "RGB"


def test_palette_with_transparency_keeps_its_colors_without_a_warning():
    palette = RGB.convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = decode(encoded(palette, "PNG", transparency=bytes(range(256))), "x")
    assert np.array_equal(np.asarray(picture), np.asarray(palette.convert("RGB")))


def transparent(kind: str) -> tuple[Image.Image, dict, np.ndarray]:
    """An image that is transparent in part, options to save it as PNG, and its opacity [H, W], 0 to 1."""
    half = np.zeros((40, 30))
    half[20:] = 1
    gradient = np.random.default_rng(1).integers(0, 256, (40, 30), dtype=np.uint8)
    image = RGB.copy()
    if kind in ("RGBA", "LA"):
        image = image.convert(kind)
        image.putalpha(Image.fromarray(gradient))
        return image, {}, gradient / 255
    if kind == "P":
        image, table = image.convert("P"), np.random.default_rng(2).integers(0, 256, 256, dtype=np.uint8)
        return image, {"transparency": table.tobytes()}, table[np.asarray(image)] / 255
    image.paste((1, 2, 3), (0, 0, 30, 20))
    if kind == "RGB":
        return image, {"transparency": (1, 2, 3)}, half
    gray = np.array(RGB.convert("L")).clip(10)
    gray[:20] = 7
    if kind == "I;16":
        return Image.fromarray(gray.astype(np.uint16) * 257), {"transparency": 7 * 257}, half
    return Image.fromarray(gray), {"transparency": 7}, half


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparent_parts_are_composed_onto_the_background(kind, background):
    image, options, opacity = transparent(kind)
    data = encoded(image, "PNG", **options)
    picture = np.asarray(decode(data, "x", decoding=Decoding(background=background))).astype(float)
    colors = np.asarray(decode(data, "x")).astype(float)  # alpha dropped, as the published loaders do
    wanted = opacity[:, :, None] * colors + (1 - opacity[:, :, None]) * np.array(background, float)
    assert np.abs(picture - wanted).max() <= 1
    if kind in ("RGBA", "RGB", "P"):
        assert np.array_equal(colors, np.asarray(image.convert("RGBA").convert("RGB")))


def test_opaque_images_do_not_depend_on_the_background():
    data = encoded(RGB, "PNG")
    assert decode(data, "x", decoding=Decoding(background=(255, 0, 0))).tobytes() == RGB.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_high_byte(kind):
    gray = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    picture = decode(encoded(Image.fromarray(gray), kind), "x")
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bit_pixels_are_refused(kind):
    with pytest.raises(DataError, match=r"a\.tif: .*32-bit pixels have no agreed range, save the image with 8"):
        decode(encoded(Image.fromarray(np.ones((4, 4), kind)), "TIFF"), "a.tif")


def test_file_and_bytes_give_the_same(tmp_path):
    path = tmp_path / "a.jpg"
    RGB.save(path)
    assert decode(path, "x").tobytes() == decode(str(path), "x").tobytes() == decode(path.read_bytes(), "x").tobytes()


def test_turns_upright_when_asked():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(RGB, "JPEG", exif=exif)
    assert decode(data, "x").size == (30, 40)
    assert decode(data, "x", decoding=Decoding(exif=True)).size == (40, 30)


@pytest.mark.parametrize(
    "damaged",
    [
        encoded(RGB, "JPEG")[:400],
        encoded(RGB, "PNG")[:400],
        encoded(RGB, "PNG").replace(b"IDAT", b"IDAX"),
        encoded(RGB, "GIF")[:20],
        b"not an image",
    ],
)
def test_damage_names_the_file(damaged):
    with pytest.raises(
        DataError, match=r"^photos/a\.jpg: the image cannot be read \(.+\); .*data\.on_decode_error=skip"
    ):
        decode(damaged, "photos/a.jpg")


def test_an_empty_file_is_named_as_such():
    message = r"^photos/a\.jpg: the image cannot be read: the file is empty; .*data\.on_decode_error=skip"
    with pytest.raises(DataError, match=message):
        decode(b"", "photos/a.jpg")


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"^here: there is no such image; restore the file or remove its entry"):
        decode(tmp_path / "gone.png", "here")


@pytest.mark.parametrize(("size", "megapixels"), [((30000, 20000), "600.0"), ((12000, 10000), "120.0")])
def test_huge_image_is_refused_by_its_header(size, megapixels):
    """600 megapixels is beyond what Pillow refuses, 120 beyond what it warns of: our own rule speaks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=rf"^a: {size[0]} x {size[1]} pixels are {megapixels} megapixels; at "):
            decode(png_header(*size), "a", max_megapixels=100)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_limit_may_be_raised_beyond_pillows():
    with pytest.raises(DataError, match="cannot be read"):  # past the limit, and then there are no pixels
        decode(png_header(30000, 20000)[:40], "a", max_megapixels=1000)


def test_limit_counts_pixels():
    assert decode(encoded(RGB, "PNG"), "a", max_megapixels=0.0012).size == (30, 40)
    with pytest.raises(DataError, match=r"at most 0\.0011 are decoded; shrink the image or raise data\.max_mega"):
        decode(encoded(RGB, "PNG"), "a", max_megapixels=0.0011)


def test_damaged_exif_tags_warn_of_nothing(tmp_path: Path) -> None:
    tags = b"Exif\0\0II*\0\x08\0\0\0\x20\0\x12\x01"  # claims 32 entries and ends within the first
    image = tmp_path / "a.jpg"
    image.write_bytes(encoded(Image.new("RGB", (8, 8)), "JPEG", exif=tags))
    code = "import sys; from dist_vpt.data.images import Decoding, decode; decode(sys.argv[1], '', 9, Decoding(True))"
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with pytest.warns(UserWarning, match="Corrupt EXIF data"), Image.open(image) as opened:
            opened.getexif()
    done = subprocess.run([sys.executable, "-c", code, image], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
