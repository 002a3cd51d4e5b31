"""Image files that a command, or a call, names."""

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_vpt.data.formats.files import find_images, passed_over
from dist_vpt.errors import UserError
from dist_vpt.files import printable


def image_files(images: Sequence[str]) -> list[Path]:
    """The files, and those in the folders, in this order. Raises UserError for what is no image file or folder."""
    files: list[Path] = []
    for image in map(Path, images):
        try:
            found = stat.S_IFMT(os.stat(image).st_mode)
        except OSError as error:
            reason = "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(f"{printable(image)}: {reason}") from error
        if found == stat.S_IFDIR:
            inside, others = find_images(image)
            line = passed_over(others, image)
            if not inside:
                raise UserError(line or f"{image}: holds no image; name a folder of images, or image files")
            if line:
                print(f"note: {line}", file=sys.stderr)
            files += inside
        elif found == stat.S_IFREG:
            files.append(image)
        else:
            raise UserError(f"{printable(image)}: neither a file nor a folder")
    return files
