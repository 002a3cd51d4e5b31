"""Extra test sets (``data.extra_tests``): folders of class folders, such as ImageNet-R, -A, -Sketch or -C.

Their classes are some or all of the task's. A folder whose folders are no classes holds several sets, at most two
levels deeper: ImageNet-C has CORRUPTION/SEVERITY/CLASS.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats.files import FileSource, Mistakes, alike_key, passed_over, subfolders
from dist_vpt.data.formats.image_folder import holds_images, read_split
from dist_vpt.data.images import Decoding
from dist_vpt.data.splits import Split
from dist_vpt.data.tasks import Task

DEEPEST = 2  # levels of folders between that of extra tests and those of classes


def open_extra_tests(recipe: DataConfig, task: Task, classes: tuple[str, ...]) -> tuple[dict[str, Split], list[str]]:
    """The sets by name, NAME or NAME/FOLDER/FOLDER, and lines about them for the log. Lists images, reads none.

    Raises DataError for all that is wrong with them.
    """
    found, lines = {}, []
    mistakes, others = Mistakes(), Counter[str]()
    for name, root in check_extra_roots(recipe).items():
        sets = [each for each in _sets(root, classes) if subfolders(each[1])]
        for inner, folder in sets:
            source = FileSource(folder, (), Decoding.of(task))
            unknown = f"is no class of {task.name}"
            split = read_split(f"{name}{inner}", folder, source, classes, mistakes, others, unknown)
            found[split.name] = split
            scored = len(np.unique(split.labels))
            if scored < len(classes) and not inner:
                lines.append(
                    f"extra test {name}: has {scored} of {len(classes)} classes, and predictions are made among these"
                )
        if not sets:
            mistakes.add(f"data.extra_tests.{name} {str(root)!r}", "has no class folders; give each class a folder")
        if line := passed_over(others, root):
            lines.append(line)
        others.clear()
    mistakes.check()
    return found, lines


def check_extra_roots(recipe: DataConfig) -> dict[str, Path]:
    """The folders as absolute paths. Raises DataError for all that are none."""
    mistakes, roots = Mistakes(), {}
    for name, folder in recipe.extra_tests.items():
        try:
            roots[name] = Path(folder).expanduser().absolute()
            if not roots[name].is_dir():
                mistakes.add(f"data.extra_tests.{name} {folder!r}", "is not a folder; use one with a folder a class")
        except (OSError, RuntimeError) as error:  # no permission, or a home that does not exist
            reason = error.strerror if isinstance(error, OSError) else error
            mistakes.add(f"data.extra_tests.{name} {folder!r}", f"cannot be read ({reason}); correct the path")
    mistakes.check()
    return roots


def _sets(folder: Path, classes: Sequence[str], depth: int = 0) -> Iterator[tuple[str, Path]]:
    """The folders of class folders in and below a folder, each with its path from there, as /FOLDER or ""."""
    inner = subfolders(folder)
    if depth == DEEPEST or _is_set(folder, inner, {alike_key(name) for name in classes}):
        yield "", folder
        return
    for name in inner:
        for below, found in _sets(folder / name, classes, depth + 1):
            yield f"/{name}{below}", found


def _is_set(folder: Path, inner: Sequence[str], classes: set[str]) -> bool:
    """Whether the folders in a folder are those of classes. A severity may be called 1, as a class may."""
    if any(holds_images(folder / name) for name in inner):
        return True
    deeper = {alike_key(name) for each in inner for name in subfolders(folder / each)}
    return not deeper & classes and any(alike_key(name) in classes for name in inner)


def mean_scores(scores: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Scores by set, with the mean over the sets of a name that has several, under this name."""
    means: dict[str, dict[str, float | None]] = {}
    names = dict.fromkeys(name.partition("/")[0] for name in scores if "/" in name)
    for name in names:
        parts = [part for each, part in scores.items() if each.partition("/")[0] == name]
        keys = [key for key in parts[0] if all(part.get(key) is not None for part in parts)]
        means[name] = {key: sum(part[key] or 0.0 for part in parts) / len(parts) for key in keys}
    return {**means, **scores}


def classes_in(split: Split, classes: int) -> np.ndarray:
    """The classes that have an image in an extra test, bool [K]."""
    return np.bincount(split.labels, minlength=classes) > 0
