"""VTAB-1k tasks from prepared TensorFlow Datasets, without TensorFlow: ArrayRecord and TFRecord files.

n examples of a split. A record is a serialized ``tf.train.Example``; images stay encoded in it until they are read,
the labels of a split are all read when they are first needed.
"""

import os
import re
import struct
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.files import Mistakes, open_root
from dist_vpt.data.images import decode, refuse_large, unreadable
from dist_vpt.data.splits import LazyLabels, Picture, Split, Splits, join
from dist_vpt.data.tasks import Part, Task, Tfds
from dist_vpt.errors import DataError, UserError

Features = Any  # name -> tf.train.Feature

LENGTH = struct.Struct("<Q")  # of a TFRecord, then 4 bytes of checksum, the payload, and 4 bytes of its checksum
CRC = struct.Struct("<I")
CLEVR_EDGES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)  # distance of the nearest object to the camera
KITTI_EDGES = (-100.0, 8.0, 20.0, 999.0)  # meters to the nearest vehicle ahead
NO_VEHICLE = 1000.0
VEHICLES = 3  # types below it: car, van, truck


def _integers(feature: Any) -> np.ndarray:
    return np.asarray(feature.int64_list.value, np.int64)


def _rows_of_3(feature: Any) -> np.ndarray:
    return np.asarray(feature.float_list.value, np.float32).reshape(-1, 3)


def bin_of(value: np.float32, edges: Sequence[float]) -> int:
    """The last edge strictly below the value, in float32; -1 where none is."""
    return int(np.sum(np.asarray(edges, np.float32) < value)) - 1


def _clevr_dist(features: Features) -> int:
    return bin_of(_rows_of_3(features["objects/pixel_coords"])[:, 2].min(), CLEVR_EDGES)


def _kitti(features: Features) -> int:
    """Distance along the camera's axis of the nearest car, van or truck."""
    types, positions = _integers(features["objects/type"]), _rows_of_3(features["objects/location"])
    nearest = positions[types < VEHICLES, 2].min(initial=np.float32(NO_VEHICLE))
    return bin_of(nearest, KITTI_EDGES)


# Labels that are computed from features (VTAB, arXiv 1910.04867, appendix A).
LABELS: dict[str, Callable[[Features], int]] = {
    "clevr_count": lambda features: len(features["objects/size"].int64_list.value) - 3,
    "clevr_dist": _clevr_dist,
    "kitti": _kitti,
    "dsprites_loc": lambda features: int(_integers(features["label_x_position"])[0] // 2.0),
    "dsprites_ori": lambda features: int(_integers(features["label_orientation"])[0] // 2.5),
}


class FileInstruction(NamedTuple):
    """Records of one file: ``take`` of them after the first ``skip``, as TFDS's readers expect."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class TfdsSource:
    """Images and labels of a split's records. Files are opened by the process that reads them."""

    def __init__(self, instructions: Sequence[FileInstruction], file_format: str, label: str, classes: int):
        self.instructions, self.file_format, self.label, self.classes = tuple(instructions), file_format, label, classes
        self._ends = np.cumsum([0, *(instruction.take for instruction in instructions)])

    def __reduce__(self) -> tuple:
        return TfdsSource, (self.instructions, self.file_format, self.label, self.classes)

    @cached_property
    def _records(self) -> Any:
        """Raw records by number."""
        try:
            if self.file_format == "tfrecord":
                return TFRecords(self.instructions)
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            return ArrayRecordDataSource(self.instructions)
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read ({error.strerror}); fix the file or its permissions"
            ) from error

    def features(self, i: int) -> Features:
        """The features of the i-th example. Raises DataError for a damaged record."""
        try:
            raw = self._records[i]
            if not raw:  # what ArrayRecord gives of a file that was cut off
                raise ValueError("the record is empty")
            return _example().FromString(raw).features.feature
        except DataError:
            raise
        except Exception as error:  # readers and protobuf raise errors of many types for damage
            raise DataError(self._damaged(i, error)) from error

    def labels(self) -> np.ndarray:
        """int64 [n], from every record. Raises DataError for damaged records and labels out of range."""
        of, mistakes = LABELS.get(self.label, lambda features: int(_integers(features[self.label])[0])), Mistakes()
        labels_n = np.zeros(int(self._ends[-1]), np.int64)
        _ = self._records  # opens the files: a truncated one is reported once
        for i in range(len(labels_n)):
            try:
                labels_n[i] = of(self.features(i))
            except DataError as error:  # a damaged chunk of ArrayRecord loses many records: the first one is reported
                raise DataError(str(error)) from error
            except (IndexError, ValueError) as error:  # features that are not there, or not of this shape
                mistakes.add(self.where(i), f"has no label {self.label} ({error}); prepare the dataset again")
                continue
            if not 0 <= labels_n[i] < self.classes:
                mistakes.add(
                    self.where(i),
                    f"label {labels_n[i]} is out of range: {self.label} has {self.classes} classes; "
                    "prepare the dataset again",
                )
        mistakes.check()
        return labels_n

    def read(self, i: int, max_megapixels: float) -> Picture:
        found = self.features(i)["image"].bytes_list.value
        if not found:
            raise DataError(f"{self.where(i)}: holds no image; prepare the dataset again")
        if found[0][:2] == b"\xff\xd8":
            return _jpeg(found[0], self.where(i), max_megapixels)
        image = decode(found[0], self.where(i), max_megapixels)
        # dSprites keeps pixels of 0 and 1.
        return image.point(lambda value: value * 255) if self.label.startswith("dsprites") else image

    def where(self, i: int) -> str:
        instruction, number = self._at(i)
        return f"{instruction.filename} record {number}"

    def identity(self, i: int) -> str:
        instruction, number = self._at(i)
        found = os.stat(instruction.filename)
        return f"{Path(instruction.filename).name} {found.st_size} {found.st_mtime_ns} {number}"

    def _at(self, i: int) -> tuple[FileInstruction, int]:
        k = int(np.searchsorted(self._ends, i, side="right")) - 1
        return self.instructions[k], self.instructions[k].skip + i - int(self._ends[k])

    def _damaged(self, i: int, error: Exception) -> str:
        return (
            f"{self.where(i)}: damaged ({type(error).__name__}: {str(error).strip()[:200]}); "
            "copy the file again, or prepare the dataset again"
        )


class TFRecords:
    """Records of TFRecord files by number, each with its checksum compared."""

    def __init__(self, instructions: Sequence[FileInstruction]):
        self._offsets: list[tuple[int, int]] = []  # of a record: file, byte
        self._files = [os.open(instruction.filename, os.O_RDONLY) for instruction in instructions]
        for k, instruction in enumerate(instructions):
            self._offsets += [(k, offset) for offset in self._index(instruction, self._files[k])]

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            os.close(file)

    def __getitem__(self, i: int) -> bytes:
        file, offset = self._offsets[i]
        descriptor = self._files[file]
        (length,) = LENGTH.unpack(os.pread(descriptor, LENGTH.size, offset))
        read = os.pread(descriptor, length + CRC.size, offset + LENGTH.size + CRC.size)
        if not _intact(read[:length], read[length:]):
            raise ValueError("its checksum differs")
        return read[:length]

    @staticmethod
    def _index(instruction: FileInstruction, file: int) -> list[int]:
        size, offset = os.fstat(file).st_size, 0
        offsets: list[int] = []
        last = instruction.skip + instruction.take
        while len(offsets) < last:
            head = os.pread(file, LENGTH.size + CRC.size, offset)
            length, sum_ = head[: LENGTH.size], head[LENGTH.size :]
            location = f"{instruction.filename} record {len(offsets)} of {instruction.examples_in_shard}"
            fix = "copy the file again, or prepare the dataset again"
            if len(sum_) == CRC.size and not _intact(length, sum_):
                raise DataError(f"{location}: damaged (the checksum of its length differs); {fix}")
            after = offset + len(head) + CRC.size + (LENGTH.unpack(length)[0] if len(sum_) == CRC.size else 0)
            if len(sum_) < CRC.size or after > size:
                raise DataError(f"{location}: the file ends before the end of it; {fix}")
            offsets.append(offset)
            offset = after
        return offsets[instruction.skip :]


def _intact(data: bytes, checksum: bytes) -> bool:
    """Whether data has this checksum: CRC-32C, masked as in TFRecord."""
    import crc32c

    found = crc32c.crc32c(data)
    return CRC.unpack(checksum)[0] == ((found >> 15 | found << 17) + 0xA282EAD8) % 2**32


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    """The task's splits from its prepared dataset below ``data.root``. Raises DataError, UserError."""
    assert task.tfds is not None
    assert task.classes is not None
    folder = find(open_root(recipe), task.tfds)
    if folder is None:
        raise DataError(missing(recipe, task))
    info = _info(folder)
    row, kind = task.tfds, info.file_format.value
    notes = []
    if not matches(folder.name, row.version):
        notes.append(f"{row.builder} has version {folder.name}; published numbers used {row.version}")
    train, val, test = (
        _split(name, part, info, kind, row.label, task.classes)
        for name, part in (("train", row.train), ("val", row.val), ("test", row.test))
    )
    names = tuple(_names(info, row.label, task.classes))
    storage = f"tfds {row.builder}:{folder.name} ({kind})"
    return Splits(names, train, val, join("trainval", train, val), test, storage=storage, notes=tuple(notes))


def missing(recipe: DataConfig, task: Task) -> str:
    """The message if a task's prepared dataset does not exist."""
    assert task.tfds is not None
    return (
        f"data.root {recipe.root!r}: there is no prepared {task.tfds.builder} (a folder "
        f"{task.tfds.builder}/VERSION with dataset_info.json) in {open_root(recipe)}; "
        f"run dist-vpt data prepare {task.name} --root {recipe.root}"
    )


def find(root: Path, row: Tfds) -> Path | None:
    """The folder of the prepared dataset: of the published version if there is one, else of the newest."""
    home = root / row.builder
    versions = [path for path in home.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", path.name)] if home.is_dir() else []
    found = [path for path in versions if (path / "dataset_info.json").is_file()]

    def rank(path: Path) -> tuple[bool, list[int]]:
        return matches(path.name, row.version), [int(number) for number in re.findall(r"\d+", path.name)]

    return max(found, key=rank, default=None)


def matches(version: str, wanted: str) -> bool:
    """Whether a version is one of ``wanted``, such as 3.*.*."""
    return all(w in ("*", v) for v, w in zip(version.split("."), wanted.split("."), strict=True))


def _split(  # noqa: PLR0917 (a part of a split of a dataset, and how to read it)
    name: str, part: Part, info: Any, kind: str, label: str, classes: int
) -> Split:
    if part.split not in info.splits:
        raise DataError(
            f"{info.data_dir}: has no split {part.split!r}, of which {name} is a part; prepare the dataset again"
        )
    start, stop = part.bounds(info.splits[part.split].num_examples)
    found = info.splits[f"{part.split}[{start}:{stop}]"].file_instructions if stop > start else []
    instructions = [FileInstruction(str(i.filename), i.skip, i.take, i.examples_in_shard) for i in found]
    lost = [instruction.filename for instruction in instructions if not os.path.isfile(instruction.filename)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise DataError(f"{lost[0]}{more}: does not exist, though dataset_info.json lists it; copy the dataset again")
    source = TfdsSource(instructions, kind, label, classes)
    return Split(name, LazyLabels(stop - start, source.labels), source)


def _names(info: Any, label: str, classes: int) -> Sequence[str]:
    """The classes' names if the label is a feature that has them, else their numbers."""
    names = getattr(info.features[label], "names", None) if label in info.features else None
    numbers = [str(k) for k in range(classes)]
    return names if names and len(names) == classes else numbers


def _info(folder: Path) -> Any:
    tfds = packages()
    try:
        return tfds.builder_from_directory(str(folder)).info
    except Exception as error:  # of many types; all mean that the folder is no prepared dataset
        raise DataError(
            f"{folder}: not a prepared dataset ({type(error).__name__}: {str(error).strip()[:200]}); "
            "copy it again, or prepare it again"
        ) from error


def packages() -> Any:
    """tensorflow-datasets, which imports no TensorFlow. Raises UserError if a package is missing."""
    try:
        import array_record  # noqa: F401
        import crc32c  # noqa: F401
        import simplejpeg  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"prepared TensorFlow Datasets are read with packages that are not installed ({error}): "
            "pip install 'dist-vpt[tfds]'"
        ) from error
    return tensorflow_datasets


def _example() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def _jpeg(data: bytes, where: str, max_megapixels: float) -> Picture:
    """Decode a JPEG as TensorFlow does, with the fast inverse DCT: Pillow's pixels differ by one gray level."""
    import simplejpeg

    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        refuse_large(width, height, where, max_megapixels)
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True)
        # Some files of the real datasets have extra bytes, of which TensorFlow only warns.
        except ValueError as warned:
            if "premature" in str(warned).lower():
                raise
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, strict=False)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(unreadable(where, error)) from error
