"""Files that hold the same bytes: images of test that are trained on, or one image under two classes."""

import contextlib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dist_vpt.data.labels import label_key
from dist_vpt.data.splits import Split, path_of
from dist_vpt.files import printable

NAMED = 3  # files in a warning
TAIL_BYTES = 512  # where images of equal size mostly differ


class Place(NamedTuple):
    """Where an image is: the name of its split, its label and its file."""

    split: str
    label: Hashable
    where: str


File = tuple[Path, Place]


def equal_files(splits: Iterable[Split]) -> list[list[Place]]:
    """Groups of files with the same bytes; images that are no files are passed over.

    Of each file its size and last bytes are compared, and only those that agree in both are read. Files that cannot be
    read are left to the loader.
    """
    files = [(path, Place(split.name, label_key(split.labels, i), split.where(i))) for split, i, path in _files(splits)]
    alike = _grouped(files, _size_and_tail)
    return [[place for _, place in group] for some in alike for group in _grouped(some, _digest)]


def _grouped(files: Iterable[File], key_of: Callable[[Path], Hashable]) -> list[list[File]]:
    """Groups of two and more files with equal keys."""
    groups: dict[Hashable, list[File]] = defaultdict(list)
    for file in files:
        with contextlib.suppress(OSError):
            groups[key_of(file[0])].append(file)
    return [group for group in groups.values() if len(group) > 1]


def _size_and_tail(path: Path) -> tuple[int, bytes]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        return size, file.read()


def _digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


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


def repeats(train: Split, val: Split | None, test: Split | None) -> list[str]:
    """Warnings about files that a split names twice, and about files of train that val names, too.

    Only paths are compared; ``leak_warning`` compares the bytes of test with those of train.
    """
    files = {split.name: list(_files([split])) for split in (train, val, test) if split is not None}
    found = []
    for name, entries in files.items():
        counts = Counter(path for _, _, path in entries)
        twice = [path for path, count in counts.items() if count > 1]
        if twice:
            found.append(f"{_some(twice)} in {name} more than once, and each entry counts; remove the others")
    trained = {path for _, _, path in files[train.name]}
    both = list(dict.fromkeys(path for _, _, path in files.get("val", []) if path in trained))
    if both:
        found.append(
            f"{_some(both)} in train and in val, so val scores are too high while train alone is trained on; remove "
            "them from one of the splits"
        )
    return found


def _some(paths: list[Path]) -> str:
    names = ", ".join(printable(path) for path in paths[:NAMED]) + (", ..." if len(paths) > NAMED else "")
    return f"1 file ({names}) is" if len(paths) == 1 else f"{len(paths):,} files ({names}) are"


def _files(splits: Iterable[Split]) -> Iterator[tuple[Split, int, Path]]:
    for split in splits:
        for i in range(len(split)):
            path = path_of(split.source, i)
            if path is None:
                break
            yield split, i, path
