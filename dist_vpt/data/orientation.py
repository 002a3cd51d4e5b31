"""Images of published sets with EXIF orientation tags, which their protocols leave alone."""

import numpy as np
from PIL import ExifTags

from dist_vpt.data.images import open_header
from dist_vpt.data.splits import Split, path_of

LOOKED_AT = 200  # images at most, evenly spread: a header takes a fraction of a millisecond


def orientation_note(split: Split) -> str:
    """A note on images that are stored turned or mirrored, or "" where none is found among those looked at."""
    rows = np.unique(np.linspace(0, len(split) - 1, min(len(split), LOOKED_AT)).astype(np.int64)).tolist()
    files = [path for row in rows if (path := path_of(split.source, row)) is not None]
    turned = sum(map(_is_turned, files))
    if not turned:
        return ""
    return (
        f"{turned:,} of {len(files):,} images of {split.name} that were looked at have an EXIF orientation, which the "
        "published protocol leaves alone; data.exif=transpose turns them"
    )


def _is_turned(file: object) -> bool:
    try:
        with open_header(str(file)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except (OSError, SyntaxError, ValueError):  # what cannot be read is reported when it is
        return False
