"""16-bit gray images that hold fewer bits, such as those of 12-bit cameras: read by the high byte they are dark."""

import numpy as np

from dist_vpt.data.images import open_header
from dist_vpt.data.splits import Split, path_of

LOOKED_AT = 24  # images at most, evenly spread; only those of 16 bits are decoded
MOST_BITS = 14  # of cameras and scanners that store their values unscaled in 16 bits


def depth_warning(split: Split) -> str:
    """A warning where the largest value of all 16-bit images that were looked at needs 14 bits or fewer, or "".

    A set of dark images looks the same as one of fewer bits, so that nothing is scaled.
    """
    rows = np.unique(np.linspace(0, len(split) - 1, min(len(split), LOOKED_AT)).astype(np.int64)).tolist()
    found = [(value, row) for row in rows if (value := _largest(split, row)) is not None]
    largest, row = max(found, default=(0, 0))
    bits = largest.bit_length()
    if not 0 < bits <= MOST_BITS:
        return ""
    return (
        f"{split.where(row)}: {largest:,} is the largest value in {len(found)} 16-bit images of {split.name} that were "
        f"looked at, and 65,535 is white: these images are read at {100 * largest / 65535:.2g} % of full brightness; "
        f"if they hold {bits}-bit values, multiply them by {2 ** (16 - bits)}, or save them with 8 bits"
    )


def _largest(split: Split, row: int) -> int | None:
    """The largest value of a 16-bit gray image file; None for others, and for what cannot be read."""
    path = path_of(split.source, row)
    if path is None:
        return None
    try:
        with open_header(path) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I;16") else None
    except Exception:  # decoders raise errors of any kind; the image is reported where it is read
        return None
