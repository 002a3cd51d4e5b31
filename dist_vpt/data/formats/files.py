"""Datasets that are a folder of image files: finding them, reading them, and reporting all mistakes."""

import contextlib
import errno
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from PIL import Image

from dist_vpt.data.addresses import is_address, shown
from dist_vpt.data.config import DataConfig
from dist_vpt.data.images import AS_PUBLISHED, Decoding, decode, image_extensions
from dist_vpt.errors import DataError
from dist_vpt.files import printable

MAX_LISTED = 10  # mistakes in a message; the others are counted
UNUSUAL = re.compile(r"\\|(^|/)\.{0,2}(/|$)")  # backslashes, or parts of a path that are empty, . or ..
TOOL_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"})


@dataclass(frozen=True, eq=False)
class FileSource:
    """Images by their paths."""

    root: Path  # absolute
    files: tuple[str, ...]  # relative to the root
    decoding: Decoding = AS_PUBLISHED

    def read(self, i: int, max_megapixels: float) -> Image.Image:
        return decode(self.root / self.files[i], self.where(i), max_megapixels, self.decoding)

    def path(self, i: int) -> Path:
        return self.root / self.files[i]

    def where(self, i: int) -> str:
        return printable(self.root / self.files[i])

    def identity(self, i: int) -> str:
        try:
            found = (self.root / self.files[i]).stat()
        except OSError:  # reported where the image is read
            return f"{self.files[i]} missing {self.decoding}"
        return f"{self.files[i]} {found.st_size} {found.st_mtime_ns} {self.decoding}"


class Mistakes:
    """Collects the mistakes in a dataset for one message."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, location: object, what: str = "") -> None:
        """Add a mistake; without ``what``, ``location`` is the complete message."""
        self._found.append(f"{location}: {what}" if what else str(location))

    def check(self) -> None:
        """Raise a DataError if there was any."""
        if self._found:
            more = len(self._found) - MAX_LISTED
            rest = [f"... and {more} more, {len(self._found)} in all"] if more > 0 else []
            raise DataError("\n".join(self._found[:MAX_LISTED] + rest))


def alike_key(name: str) -> str:
    """Equal for names that some systems take for the same: in any case, accents composed or not."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class MissingFile(ValueError):
    """A path that leads to no file."""


class Folder:
    """The files below a root, each folder listed once: a dataset may have a hundred thousand of them."""

    def __init__(self, root: Path, below: tuple[str, ...], decoding: Decoding):
        self.root, self.decoding = root, decoding
        self.below = below  # folders in which a relative path may start, in this order
        self._listings: dict[str, frozenset[str]] = {}
        self._by_key: dict[str, dict[str, list[str]]] = {}  # of folders in which a path was not found as it is

    def find(self, path: str) -> str:
        """The path relative to the root. Raises ValueError if it leaves the root, MissingFile if it does not exist.

        A path that another system wrote (with backslashes, in other case, with composed or decomposed accents) is that
        of the only file that it can mean.
        """
        if not UNUSUAL.search(path):  # as nearly all are: taking them apart would take most of the time
            for start in self.below:
                folder, _, name = (inner := f"{start}/{path}" if start else path).rpartition("/")
                if name in self._listing(folder):
                    return inner
        parts = PurePosixPath(path).parts
        foreign = PurePosixPath(path.replace("\\", "/")).parts
        if path.startswith(("/", "\\")) or ".." in foreign or re.match(r"[A-Za-z]:[\\/]", path):
            raise ValueError(
                f"path {path!r} leaves the dataset's folder; use a path relative to the folder, without '..'"
            )
        for start in self.below:
            inner = str(PurePosixPath(start, *parts))
            folder, name = os.path.split(inner)
            if name in self._listing(folder):
                return inner
        found = [inner for start in self.below for inner in self._alike(start, foreign)]
        if len(found) == 1:
            return found[0]
        folders = " or ".join(str(self.root / start) for start in self.below)
        fix = (
            f"{' and '.join(found)} could both be meant; write one of them"
            if found
            else "restore it or remove its entry"
        )
        raise (ValueError if found else MissingFile)(f"there is no file {path!r} in {folders}; {fix}")

    def _alike(self, folder: str, parts: Sequence[str]) -> list[str]:
        """Files below a folder whose paths differ from ``parts`` in case or in the composition of accents alone."""
        if not parts:
            return [folder] if os.path.basename(folder) in self._listing(os.path.dirname(folder)) else []
        alike = self._names(folder).get(alike_key(parts[0]), [])
        return [path for name in alike for path in self._alike(f"{folder}/{name}" if folder else name, parts[1:])]

    def _names(self, folder: str) -> dict[str, list[str]]:
        """Names of files and folders in a folder, by what they have in common with others."""
        if folder not in self._by_key:
            self._by_key[folder] = {}
            with contextlib.suppress(OSError):
                for name in sorted(os.listdir(self.root / folder)):
                    self._by_key[folder].setdefault(alike_key(name), []).append(name)
        return self._by_key[folder]

    def _listing(self, folder: str) -> frozenset[str]:
        if folder not in self._listings:
            try:
                with os.scandir(self.root / folder) as entries:
                    self._listings[folder] = frozenset(entry.name for entry in entries if _is_file(entry))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                    raise ValueError(
                        f"folder {printable(self.root / folder)} cannot be read ({error.strerror}); fix its permissions"
                    ) from error
                self._listings[folder] = frozenset()
        return self._listings[folder]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a folder that other programs leave among images."""
    return name.startswith(".") or name.lower() in TOOL_FOLDERS


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones. Raises DataError where it cannot be read."""
    return [entry.name for entry in _scan(folder) if _is_dir(entry)]


def folder_id(folder: Path) -> tuple[int, int]:
    """Equal for all paths of a folder."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def find_images(folder: Path, elsewhere: Iterable[tuple[int, int]] = ()) -> tuple[list[Path], Counter[str]]:
    """The images below a folder, sorted, and how many other files there are, by extension.

    Hidden files and folders, and those of other programs, do not count. A folder that links reach twice is entered
    once, and one whose id is ``elsewhere`` not at all. Raises DataError for a folder that cannot be read.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    left, entered = [folder], {*elsewhere}
    while left:
        inner = left.pop()
        for entry in _scan(inner):
            path, extension = inner / entry.name, os.path.splitext(entry.name)[1].lower()
            if _is_dir(entry):
                if folder_id(path) not in entered:
                    entered.add(folder_id(path))
                    left.append(path)
            elif extension not in image_extensions():
                others[extension or "without extension"] += 1
            elif entry.is_symlink() or entry.is_file():  # a link to nothing is reported where it is read
                images.append(path)
            else:
                others[f"special files {extension}"] += 1
    return sorted(images), others


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{printable(folder)}: cannot be read ({error.strerror}); fix its permissions or remove it"
        ) from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def kinds(others: Counter[str]) -> str:
    """Files that are no images, counted by extension, and how HEIC could be read."""
    shown = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5))
    heif = {".heic", ".heif"} & set(others)
    return f"{shown}{', ...' if len(others) > 5 else ''}{'; pip install pillow-heif reads HEIC' if heif else ''}"


def passed_over(others: Counter[str], folder: Path) -> str:
    """A line about files that are no images, or ""."""
    return f"{folder}: files without the extension of an image are not read: {kinds(others)}" if others else ""


def open_root(recipe: DataConfig) -> Path:
    """The recipe's root as an absolute path, or a DataError if it is no folder."""
    assert recipe.root is not None  # DataConfig requires it
    if is_address(recipe.root):
        raise DataError(
            f"data.root {shown(recipe.root)!r}: is an address, which only data.format=webdataset and, with "
            "data.streaming=true, hf read; download the data and give its folder"
        )
    try:
        root = Path(recipe.root).expanduser().absolute()
        there = root.is_dir()
        if there:
            os.scandir(root).close()
    except (OSError, RuntimeError) as error:  # such as a home that does not exist, or no permission
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"data.root {recipe.root!r}: cannot be read ({reason}); correct the path or its permissions"
        ) from error
    if not there:
        siblings = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        near = get_close_matches(root.name, siblings, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "use the folder of the dataset"
        raise DataError(f"data.root {recipe.root!r}: {root} is not a folder; {hint}")
    return root


def open_home(recipe: DataConfig, names: Sequence[str], holds: str) -> Path:
    """The dataset's folder, which contains the file ``holds``: the recipe's root, or one of these folders below it.

    Names match in any case. Returns the root if there is none.
    """
    root = open_root(recipe)
    if (root / holds).is_file():
        return root
    below = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    found = [below[name.lower()] for name in names if name.lower() in below]
    return next((path for path in found if (path / holds).is_file()), root)


def read_text(file: Path) -> str:
    """The text of a small file of the dataset."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{file}: there is no such file, and the format needs it; add it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); fix the file or its permissions") from None
