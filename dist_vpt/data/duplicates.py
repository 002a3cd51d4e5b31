"""Files that hold the same bytes: images of test that are trained on, or one image under two classes."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dist_vpt.data.splits import Split, path_of


class Place(NamedTuple):
    """Where an image is: the name of its split, its label and its file."""

    split: str
    label: int
    where: str


def equal_files(splits: Iterable[Split]) -> list[list[Place]]:
    """Groups of files with the same bytes. Only files of equal size are read; images that are no files are passed over.

    Files that cannot be read are left to the loader.
    """
    by_size: dict[int, dict[Path, list[Place]]] = defaultdict(lambda: defaultdict(list))
    for split, i, path in _files(splits):
        try:
            by_size[path.stat().st_size][path].append(Place(split.name, int(split.labels[i]), split.where(i)))
        except OSError:
            continue
    groups: dict[str, list[Place]] = defaultdict(list)
    for files in by_size.values():
        if sum(map(len, files.values())) < 2:
            continue
        for path, places in files.items():
            try:
                groups[hashlib.sha256(path.read_bytes()).hexdigest()] += places
            except OSError:
                continue
    return [group for group in groups.values() if len(group) > 1]


def leak_warning(trained_on: Split, test: Split) -> str:
    """A warning about images of test that are trained on, too, byte for byte; or ""."""
    leaks = []
    for group in equal_files((trained_on, test)):
        inside = [place for place in group if place.split == test.name]
        outside = [place for place in group if place.split != test.name]
        leaks += [(place, outside[0]) for place in inside if outside]
    if not leaks:
        return ""
    first, other = leaks[0]
    count = "1 file" if len(leaks) == 1 else f"{len(leaks)} files"
    return (
        f"{count} of test can be trained on too, byte for byte, such as {first.where} = {other.where}, so test "
        "scores are too high; remove them from one of the splits (data.check_leaks=false skips this comparison)"
    )


def _files(splits: Iterable[Split]) -> Iterator[tuple[Split, int, Path]]:
    for split in splits:
        for i in range(len(split)):
            path = path_of(split.source, i)
            if path is None:
                break
            yield split, i, path
