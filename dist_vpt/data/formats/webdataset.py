"""WebDataset shards: tar files in which members of one name are a sample, such as 0001.jpg and 0001.cls.

The shards of a split have it in their name or in that of their folder (train-0000.tar, val/0000.tar), or match a
pattern of ``data.webdataset.splits``. They are on this machine, or below an address. n samples of a split.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
from PIL import Image

from dist_vpt.data.addresses import RemoteFile, is_address, read_text_of, shown
from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.files import Mistakes, open_root, read_text
from dist_vpt.data.formats.image_folder import SPLIT_NAMES, split_of
from dist_vpt.data.formats.tar_index import (
    Fields,
    Shard,
    TarIndex,
    label_field,
    read_index,
    read_member,
    shown_shard,
)
from dist_vpt.data.formats.tar_spans import TarSpans, find_addresses, find_files, find_spans, within_budget
from dist_vpt.data.images import AS_PUBLISHED, Decoding, decode
from dist_vpt.data.pieces import Pieces
from dist_vpt.data.splits import Split, Splits, class_order, with_missing_splits
from dist_vpt.data.spool import Spool, open_spool
from dist_vpt.data.tasks import Task
from dist_vpt.data.waiting import in_parallel
from dist_vpt.errors import DataError, nearest
from dist_vpt.files import printable

Found = tuple[dict[str, list[Shard]], bool, list[str]]

SCANNERS = 8  # shards that a process indexes at a time, each with as much as two spans in memory
NO_TEST = "set train.test=false to train without it"


@dataclass(frozen=True, eq=False)
class TarSource:
    """Images in tar files, each read at its place."""

    shards: tuple[Shard, ...]
    shard_n: np.ndarray  # int32: which of the shards
    key_n: np.ndarray  # bytes
    offset_n: np.ndarray  # int64
    size_n: np.ndarray  # int64
    decoding: Decoding = AS_PUBLISHED
    spans: TarSpans | None = None  # of shards behind addresses

    def read(self, i: int, max_megapixels: float) -> Image.Image:
        size = int(self.size_n[i])
        try:
            encoded = self._bytes(i, int(self.offset_n[i]), size)
        except OSError as error:
            raise DataError(f"{self.where(i)}: cannot be read ({error.strerror}); restore the shard") from None
        if len(encoded) < size:
            raise DataError(f"{self.where(i)}: the shard ends before its end; copy it again")
        return decode(encoded, self.where(i), max_megapixels, self.decoding)

    def where(self, i: int) -> str:
        return f"{shown_shard(self.shards[self.shard_n[i]])} sample {printable(os.fsdecode(bytes(self.key_n[i])))}"

    def identity(self, i: int) -> str:
        shard = self.shards[self.shard_n[i]]
        if isinstance(shard, RemoteFile):
            return f"{shard.address} {shard.size} {shard.version} {self.offset_n[i]} {self.decoding}"
        try:
            found = shard.stat()
        except OSError:  # reported where the image is read
            return f"{shard.name} missing"
        return f"{shard.name} {found.st_size} {found.st_mtime_ns} {self.offset_n[i]} {self.decoding}"

    @property
    def pieces(self) -> Pieces | None:
        return None if self.spans is None else self.spans.pieces

    def _bytes(self, i: int, offset: int, size: int) -> bytes:
        if self.spans is not None:
            return self.spans.read(i, offset, size)
        shard = self.shards[self.shard_n[i]]
        assert isinstance(shard, Path)
        return read_member(shard, offset, size)


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    streamed = is_address(recipe.root)
    root = shown(str(recipe.root)) if streamed else printable(open_root(recipe))
    shards, whole, remarks = _find_remote_shards(recipe) if streamed else find_shards(recipe)
    spool = open_spool(recipe.streaming_disk_gib) if streamed else None
    settings = recipe.webdataset
    fields = Fields(settings.image, settings.label or label_field(shards["train"][0]))
    sources, texts = {}, {}
    every = [file for files in shards.values() for file in files]
    for name, files in shards.items():
        indexes = _indexes(files, fields, spool, every)
        sources[name] = _source(files, indexes, Decoding.of(task))
        if spool is not None:
            sources[name] = _in_spans(sources[name], recipe.streaming_shuffle, spool)
        texts[name] = np.concatenate([index.label_n for index in indexes])
        if not len(texts[name]):
            raise DataError(f"{shown_shard(files[0])} and the other shards of {name}: hold no sample; write them again")
    missing = {}
    if not whole and "test" not in shards:
        missing["test"] = f"{root} has no shards of test; add them, or {NO_TEST}"
    elif "test" in texts and not np.any(texts["test"] != b""):
        del texts["test"]
        missing["test"] = (
            f"{shown_shard(shards['test'][0])}: samples of test have no {fields.label}; add it, or {NO_TEST}"
        )
    classes, labels = _labels(recipe, fields, texts, sources)
    found = {name: Split(name, labels[name], sources[name]) for name in texts}
    splits = with_missing_splits(recipe, classes, found, holdout_test=whole, missing=missing)
    return replace(splits, remarks=(*remarks, *_given_twice(shards)))


def _given_twice(shards: Mapping[str, Sequence[Shard]]) -> list[str]:
    """Lines about shards that train has more than once, or has in common with another split."""
    train, lines = Counter(shards["train"]), []
    if twice := [shard for shard, count in train.items() if count > 1]:
        lines.append(f"train has {shown_shard(twice[0])} more than once{_and_others(twice)}: name each shard once")
    for name in sorted(shards.keys() - {"train"}):
        if shared := [shard for shard in shards[name] if shard in train]:
            lines.append(
                f"{name} has {shown_shard(shared[0])}{_and_others(shared)}, which train has, too: its scores are too "
                "good; give each shard to one split"
            )
    return lines


def _and_others(shards: Sequence[Shard]) -> str:
    return f" and {len(shards) - 1} more" if len(shards) > 1 else ""


def find_shards(recipe: DataConfig) -> Found:
    """The shards of each split; whether all are train, as none says its split; lines about what is not read.

    Raises DataError; opens no shard.
    """
    root = open_root(recipe)
    if recipe.webdataset.splits:
        return _matching(root, {str(name): pattern for name, pattern in recipe.webdataset.splits.items()}), False, []
    every = sorted(path for path in (*root.glob("*.tar"), *root.glob("*/*.tar")) if not path.name.startswith("."))
    if not every:
        others = Counter("".join(path.suffixes[-2:]) for path in root.iterdir() if path.is_file())
        held = f" but {', '.join(f'{count} {name}' for name, count in others.most_common(3))}" if others else ""
        raise DataError(
            f"data.root {recipe.root!r}: has no .tar in it or in its folders{held}; give the folder of the shards, and "
            "decompress those that are compressed"
        )
    return _by_split(printable(root), [(path, path.relative_to(root)) for path in every])


def _find_remote_shards(recipe: DataConfig) -> Found:
    addresses = find_addresses(recipe)
    files = find_files(addresses)
    if "" not in files:
        return {name: list(some) for name, some in files.items()}, False, []
    below = [PurePosixPath(*PurePosixPath(each).parts[-2:]) for each in addresses[""]]
    return _by_split(shown(str(recipe.root)), list(zip(files[""], below, strict=True)))


def _by_split(root: str, shards: Sequence[tuple[Shard, PurePath]]) -> Found:
    """Shards by the split in their names below the root."""
    by_split: dict[str | None, list[Shard]] = {}
    for shard, name in shards:
        by_split.setdefault(_split_in(name), []).append(shard)
    unnamed = by_split.pop(None, [])
    if not by_split:
        return {"train": unnamed}, True, []
    if "train" not in by_split:
        raise DataError(
            f"{root}: has shards of {' and '.join(map(str, by_split))} but none of train; name them: "
            "'data.webdataset.splits={train: ...}'"
        )
    lines = [f"{root}: shards of no split, which are not read: {len(unnamed)}"] if unnamed else []
    return {name: by_split[name] for name in SPLIT_NAMES if name in by_split}, False, lines


def _matching(root: Path, patterns: Mapping[str, str]) -> dict[str, list[Shard]]:
    found: dict[str, list[Shard]] = {}
    for name, pattern in patterns.items():
        if "{" in pattern or pattern.startswith(("/", "~")) or "://" in pattern:
            raise DataError(
                f"data.webdataset.splits.{name} {pattern!r}: must be a pattern of files below data.root with * and ?, "
                "such as train-*.tar"
            )
        files = sorted(path for path in root.glob(pattern) if path.is_file())
        found[name] = [*files]
        if not files:
            raise DataError(f"data.webdataset.splits.{name} {pattern!r}: matches no file in {printable(root)}")
    if "train" not in found:
        raise DataError("data.webdataset.splits: has no train; name its shards: {train: 'train-*.tar'}")
    return found


def _split_in(path: PurePath) -> str | None:
    """The only split that the names of a shard and its folder hold."""
    words = {split_of(word) for word in re.split(r"[^A-Za-z]+", str(path.with_suffix("")))} - {None}
    return words.pop() if len(words) == 1 else None


def _indexes(files: Sequence[Shard], fields: Fields, spool: Spool | None, every: Sequence[Shard]) -> list[TarIndex]:
    """The indexes of a split's shards; of ``every`` shard of the splits, the spool keeps what it has room for."""
    if spool is None:
        return [read_index(file, fields) for file in files]
    kept = within_budget(_remote(every), spool)
    doing = "reading shards for the index, which is kept"
    return in_parallel(
        lambda file: read_index(file, fields, spool if file in kept else None), _remote(files), doing, readers=SCANNERS
    )


def _remote(shards: Sequence[Shard]) -> list[RemoteFile]:
    return [shard for shard in shards if isinstance(shard, RemoteFile)]


def _in_spans(source: TarSource, window: int, spool: Spool) -> TarSource:
    """The source with its images fetched by spans."""
    shards = _remote(source.shards)
    spans = find_spans(shards, source.shard_n, source.offset_n, source.size_n, window, spool)
    return replace(source, spans=spans)


def _source(files: Sequence[Shard], indexes: Sequence[TarIndex], decoding: Decoding) -> TarSource:
    sizes = [len(index.offset_n) for index in indexes]
    return TarSource(
        tuple(files),
        np.repeat(np.arange(len(files), dtype=np.int32), sizes),
        np.concatenate([index.key_n for index in indexes]),
        np.concatenate([index.offset_n for index in indexes]),
        np.concatenate([index.size_n for index in indexes]),
        decoding,
    )


def _labels(
    recipe: DataConfig, fields: Fields, texts: Mapping[str, np.ndarray], sources: Mapping[str, TarSource]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes, and the labels int64 [n] of each split."""
    written = {name: np.unique(text_n, return_inverse=True) for name, text_n in texts.items()}
    names = {name: [bytes(text).decode() for text in unique_n] for name, (unique_n, _) in written.items()}
    given = _given_classes(recipe)
    classes = given or class_order(text for text in names["train"] if text)
    every = {text for some in names.values() for text in some}
    numbered = given is not None and not every <= {*given} and all(re.fullmatch(r"\d{1,9}", text) for text in every)
    label_of = {name: k for k, name in enumerate(classes)}
    mistakes, labels = Mistakes(), {}
    for name, (_, inverse_n) in written.items():
        of_each = [int(text) if numbered else label_of.get(text, -1) for text in names[name]]
        labels[name] = np.array(of_each, np.int64)[inverse_n]
        for k, label in enumerate(of_each):
            if not 0 <= label < len(classes):
                rows = np.flatnonzero(inverse_n == k)
                rule = _rule(names[name][k], classes, fields, given=given is not None, numbered=numbered)
                more = f" (and {len(rows) - 1} more samples)" if len(rows) > 1 else ""
                mistakes.add(f"{sources[name].where(int(rows[0]))}{more}", rule)
    mistakes.check()
    return classes, labels


def _given_classes(recipe: DataConfig) -> tuple[str, ...] | None:
    """The classes that the recipe or classes.txt names, or None."""
    given, source = recipe.webdataset.classes, "data.webdataset.classes"
    if given is None:
        source, text = _classes_file(recipe)
        given = None if text is None else tuple(line for line in map(str.strip, text.splitlines()) if line)
    if given is not None and (len({*given}) < len(given) or not given):
        raise DataError(f"{source}: {'a class occurs twice' if given else 'names no class'}; name each class once")
    return given


def _classes_file(recipe: DataConfig) -> tuple[str, str | None]:
    """The name of classes.txt below the root, and its text if it is there."""
    if is_address(recipe.root):
        address = f"{str(recipe.root).rstrip('/')}/classes.txt"
        return shown(address), read_text_of(address)
    file = open_root(recipe) / "classes.txt"
    return printable(file), read_text(file) if file.is_file() else None


def _rule(text: str, classes: Sequence[str], fields: Fields, *, given: bool, numbered: bool) -> str:
    """What is wrong with a label, and the fix."""
    if not text:
        return f"has no label ({fields.label}); add it, or remove the sample"
    if numbered:
        return f"label {text} is out of range: {len(classes)} classes have the numbers 0 to {len(classes) - 1}; fix it"
    rule = "is none of the classes that are given" if given else "has no image in train"
    hint = nearest(text, classes)
    return f"label {text!r} {rule}; {hint if len(classes) < 100 or hint.startswith('did') else 'fix it'}"
