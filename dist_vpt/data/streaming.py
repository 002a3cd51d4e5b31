"""What is checked and said of streamed data before training: how much is fetched, and whether the disk has room."""

import math
from collections.abc import Iterator

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.pieces import GIB, Pieces, pieces_of
from dist_vpt.data.splits import Splits
from dist_vpt.data.spool import cache_subfolder
from dist_vpt.errors import UserError

LEAST_MIXED = 0.7  # of the classes that chance gives a window


def check_disk(recipe: DataConfig, splits: Splits) -> None:
    """Raises UserError where the images that are shuffled with each other do not fit into the spool."""
    pieces = pieces_of(splits[recipe.train_on].source)
    assert pieces is not None  # of a format that is streamed
    if pieces.at_once > recipe.streaming_disk_gib * GIB:
        window = min(recipe.streaming_shuffle, len(pieces.piece_n))
        enough = math.ceil(110 * pieces.at_once / GIB) / 100
        raise UserError(
            f"data.streaming_disk_gib {recipe.streaming_disk_gib:g}: the {window:,} images that are shuffled with each "
            f"other are in pieces of {_size(pieces.at_once)}, which would be fetched again and again; raise it to "
            f"{enough:g} or more, or lower data.streaming_shuffle"
        )


def streaming_remarks(recipe: DataConfig, splits: Splits) -> Iterator[str]:
    """Lines for the log."""
    found = {name: pieces_of(split.source) for name in ("train", "val", "test") if (split := getattr(splits, name))}
    pieces = {name: some for name, some in found.items() if some is not None}
    sizes = ", ".join(f"{name} {_size(some.total)}" for name, some in pieces.items())
    yield (
        f"streamed: {sizes}; at most {recipe.streaming_disk_gib:g} GiB of them at a time in {cache_subfolder('pieces')}"
    )
    trained = pieces_of(splits[recipe.train_on].source)
    if trained is not None and (share := mixed_share(trained, splits[recipe.train_on].labels)) < LEAST_MIXED:
        yield (
            f"images of a class are stored next to each other: the {trained.window:,} images that are shuffled with "
            f"each other (data.streaming_shuffle) have {100 * share:.0f} % of the classes that a random order gives, "
            "from which training suffers; write the files in a random order, or raise data.streaming_shuffle"
        )
    for name in dict.fromkeys((*splits.held_out, *splits.drawn)):
        # Where everything fits, it is fetched once.
        if name in pieces and sum(some.total for some in pieces.values()) > recipe.streaming_disk_gib * GIB:
            yield (
                f"images of {name} were chosen one by one, so each pass over it fetches the pieces that hold them: "
                f"{_size(pieces[name].total)}; shards or files of its own would hold nothing else"
            )


def mixed_share(pieces: Pieces, labels_n: np.ndarray) -> float:
    """How many classes a window has, as a share of those of as many images drawn one by one: 1 if well mixed."""
    count, number_n = len(labels_n), np.unique(pieces.piece_n, return_inverse=True)[1]
    G = int(number_n.max()) + 1
    rest = 1 - min(pieces.window / count, 1)  # the share of the pieces, and of the images, that a window leaves out
    _, label_n, images_K = np.unique(labels_n, return_inverse=True, return_counts=True)
    pairs = np.unique(label_n.astype(np.int64) * G + number_n)
    pieces_K = np.bincount(pairs // G, minlength=len(images_K))
    return float((1 - rest**pieces_K).sum() / (1 - rest**images_K).sum())


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
