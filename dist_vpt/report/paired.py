"""``dist-vpt compare``: runs on the same test images, image by image.

n images, and of two runs a images that only the first one got right, and b that only the second one did.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.recipe.sharing import NOT_SHARED
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.score_files import read_predictions, table_file

DRAWS = 10_000  # of the bootstrap
SEED = 0  # of these draws
LEVEL = 0.95  # of the interval; a smaller p-value than what it leaves is called a difference


@dataclass(frozen=True)
class Predicted:
    """What a run took the images of a split for."""

    run: str
    images: tuple[tuple[str, str], ...]  # name and label, in the split's order
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Comparison:
    """Of two runs."""

    first: str
    second: str
    difference: float  # accuracy of the second one less that of the first one, in points
    interval: tuple[float, float]  # of the difference, 95 %, in points
    only_first: int  # images that only the first one got right
    only_second: int
    p_value: float  # of McNemar's test
    verdict: str


def compare_runs(
    runs: Sequence[str], split: str = "test", adapters: str = "last", *, as_json: bool = False
) -> list[Comparison]:
    """Compare each run with the first one, and print what was found.

    Raises UserError where there are fewer than two runs, one that is not finished, one without predictions, and where
    their images are not the same.
    """
    if len(runs) < 2:
        raise UserError("compare: there is nothing to compare with one run; name two or more")
    found = [predicted(run, split, adapters) for run in runs]
    for other in found[1:]:
        refuse_other_images(found[0], other)
    comparisons = [compare_two(found[0], other) for other in found[1:]]
    if as_json:
        accuracies = [{"run": one.run, "accuracy": one.accuracy, "images": len(one.images)} for one in found]
        compared = [asdict(each) for each in comparisons]
        print(json.dumps({"split": split, "adapters": adapters, "runs": accuracies, "comparisons": compared}, indent=1))
    else:
        _show(found, comparisons, split)
    return comparisons


def predicted(run: str, split: str, adapters: str) -> Predicted:
    """What a finished run, or ``eval --out``, took the images of a split for."""
    folder, file = RunFolder(run), table_file(Path(run), "predictions", split, adapters)
    folder.refuse_sweep()
    if folder.recipe.is_file():
        _refuse_run(run, folder)
    elif not file.is_file():
        raise RunFolderError(
            f"{run}: neither a run folder (no recipe.yaml) nor one of `dist-vpt eval --out` (no {file.name}); name a "
            "folder that `train` wrote"
        )
    if not file.is_file():
        raise UserError(f"{file}: no predictions here; {_how_to_write(folder, split, adapters)}")
    rows = read_predictions(file)
    images = tuple((row["image"], row["label"]) for row in rows)
    return Predicted(run, images, tuple(row["label"] == row["predicted"] for row in rows))


def _refuse_run(run: str, folder: RunFolder) -> None:
    """Raises RunFolderError or UserError for a run that cannot be compared."""
    status = folder.status().get("status", "done")  # a run that was shared has no run.json
    if status != "done":
        raise RunFolderError(f"{run}: the run is not finished (status: {status}); run.resume=auto ends it")
    if folder.load().data.labels == "multiple":
        raise UserError(
            f"{run}: data.labels = multiple: runs are compared by which images are right, and an image has several "
            "labels; compare their mAP and per_class.csv"
        )


def _how_to_write(folder: RunFolder, split: str, adapters: str) -> str:
    """The command that writes the predictions that are missing."""
    options = " --adapters best" if adapters == "best" else ""
    if split in ("train", "val", "trainval"):
        options += f" --split {split}"
    elif "/" in split:
        return "those on the sets of an extra test are not kept: give the set a name of its own in data.extra_tests"
    elif split not in ("test", *folder.load().data.extra_tests):
        options += f" data.extra_tests.{split}=FOLDER"
    root = " data.root=FOLDER" if folder.load().data.root == NOT_SHARED else ""
    return f"`dist-vpt eval {folder.path}{options}{root} --out {folder.path}` writes them"


def refuse_other_images(first: Predicted, second: Predicted) -> None:
    """Raises UserError where two runs were scored on other images, or on images with other labels."""
    if first.images == second.images:
        return
    labels, more = dict(second.images), len(second.images) - len(first.images)
    reason = f"the second one has {more} images more" if more > 0 else "their images are in another order"
    for image, label in first.images:
        if image not in labels:
            reason = f"image {image!r} is scored in the first one alone"
            break
        if labels[image] != label:
            reason = f"image {image!r} is {label!r} in the first one, and {labels[image]!r} in the second one"
            break
    raise UserError(f"{first.run} and {second.run}: {reason}; compare runs that were scored on the same images")


def compare_two(first: Predicted, second: Predicted) -> Comparison:
    """The difference of two runs' accuracies on the same images, and whether chance explains it.

    McNemar's exact test: were both equally good, each image that only one of them got right would be either's with
    probability 1/2 (McNemar 1947, Psychometrika 12; two-sided). The interval is that of the paired bootstrap: images
    are drawn with replacement, 10,000 times, and 2.5 % of the differences are left out at each end (Efron and
    Tibshirani 1993, chapter 13).
    """
    from scipy.stats import binomtest

    pairs = list(zip(first.right, second.right, strict=True))
    a, b = pairs.count((True, False)), pairs.count((False, True))
    p_value = float(binomtest(a, a + b, 0.5).pvalue) if a + b else 1.0
    difference, interval = 100 * (b - a) / len(pairs), bootstrap_interval(a, b, len(pairs))
    verdict = _verdict(first.run, second.run, a, b, p_value)
    return Comparison(first.run, second.run, difference, interval, a, b, p_value, verdict)


def _verdict(first: str, second: str, a: int, b: int, p_value: float) -> str:
    if not a + b:
        return f"{first} and {second} are right on the same images"
    better, worse, most, fewest = (second, first, b, a) if b > a else (first, second, a, b)
    alone = f"{most} images are right in it alone, {fewest} in the other alone"
    if p_value < 1 - LEVEL:
        return f"{better} is better than {worse}: {alone}, which chance would hardly give (p = {p_value:.2g})"
    return f"{first} and {second} cannot be told apart: {most} and {fewest} images are right in one alone, " + (
        f"which chance would often give (p = {p_value:.2g})"
    )


def bootstrap_interval(a: int, b: int, n: int) -> tuple[float, float]:
    """The 95 % interval of 100 (b - a) / n.

    A draw of n images with replacement has so many of the three kinds (only the first right, only the second, no
    difference) as a draw of the multinomial distribution with their shares.
    """
    import numpy as np

    kinds = np.random.default_rng(SEED).multinomial(n, [a / n, b / n, (n - a - b) / n], size=DRAWS)
    low, high = np.quantile(100 * (kinds[:, 1] - kinds[:, 0]) / n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _show(found: Sequence[Predicted], comparisons: Sequence[Comparison], split: str) -> None:
    table = Table(title=f"{split}, {len(found[0].images):,} images; right in one alone: the first run, this run")
    for column in ("run", "top1, %", "difference", "95 % interval", "alone", "p"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column != "run")
    table.add_row(Text(found[0].run, overflow="fold"), f"{found[0].accuracy:.2f}", "", "", "", "")
    for one, compared in zip(found[1:], comparisons, strict=True):
        low, high = compared.interval
        table.add_row(
            Text(one.run, overflow="fold"),
            f"{one.accuracy:.2f}",
            f"{compared.difference:+.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{compared.only_first}, {compared.only_second}",
            f"{compared.p_value:.2g}",
        )
    console = Console()
    console.print(table)
    for compared in comparisons:
        console.print(compared.verdict, markup=False, soft_wrap=True, highlight=False)
