"""results.jsonl: a line for each task and method, appended when its seeds are scored or when it failed."""

import errno
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from filelock import lock_descriptor
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dist_vpt.errors import UserError
from dist_vpt.runs.scores import has_main_score, metric_of

FILE = "results.jsonl"


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Spread(_Line):
    """Of one score over seeds."""

    mean: float
    std: float  # n - 1; 0 for one seed
    values: tuple[float, ...]


class Protocol(_Line):
    """The evaluation protocol: two numbers are comparable if theirs are equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    settings: str = "published"  # whose method settings: published, or this package's (default)
    storage: str  # format and version of what was read
    resize: str
    fit: str
    augment: str = "none"
    normalize: str  # or mean and std, where the recipe gives them
    image_size: int  # pixels
    image_sizes: tuple[int, ...] = ()  # of each of several backbones
    counts: dict[str, int | None]  # images of train, val, trainval and test
    exif: str = "ignore"  # orientation
    background: str = "none"  # under transparent images
    test_crops: int = 1  # views of an image in evaluation
    extras: tuple[str, ...] = ()  # keys of training that no published protocol has, such as train.mixup_alpha
    fraction: float = 1.0  # of train that is used
    shots: int | None = None  # images of each class of train that are used, which the seeds are trained on; None: all
    tries: int = 1  # draws of these images, of which each seed has one; 1: all seeds have the same
    carved: tuple[str, ...] = ()  # splits that the dataset lacks, taken out of train by a seed
    position_resize: str = "timm"  # how learned positions are resampled to another image size than the weights'
    trials: int  # settings that were chosen among
    epochs: int
    search: str = "grid"  # halving: of all the settings only some were trained for so many epochs
    notes: tuple[str, ...] = ()  # what differs from the published protocol

    def differs(self, other: "Protocol") -> list[str]:
        """Names of the fields in which two protocols differ, but for the storage's version and the task's counts."""
        mine, theirs = self.model_dump(), other.model_dump()
        mine["storage"], theirs["storage"] = (each.storage.partition(" ")[0] for each in (self, other))
        return [name for name in mine if name != "counts" and mine[name] != theirs[name]]


class Parameters(_Line):
    """Counts of numbers."""

    trained: int
    total: int


class Result(_Line):
    """One task under one method: chosen on val, trained on trainval once for each seed, scored on test."""

    run: str  # hash of what makes the numbers in the resolved recipe
    task: str
    group: str | None
    method: str  # the stem of the method's recipe
    backbone: str
    precision: str
    protocol: Protocol | None = None  # none only for what failed before its data were read
    seeds: tuple[int, ...] = ()  # that were scored
    chosen: dict[str, Any] = {}  # recipe keys of the trial that was best on val
    val: dict[str, float] = {}  # main score (%) of the chosen trial on val: after the last epoch, and of the best one
    epochs: dict[str, int] = {}  # the chosen trial's last and best epoch
    # By score (loss, and in percent top1, top5, per_class, mAP, f1_macro, ece, ...) after the last epoch on trainval.
    test: dict[str, Spread] = {}
    extra_tests: dict[str, dict[str, Spread]] = {}  # the same by extra test (data.extra_tests)
    seconds: float = Field(0.0, ge=0)  # of training, all trials and seeds
    peak_memory_mib: float = Field(0.0, ge=0)  # largest of the seeds' runs
    parameters: Parameters | None = None
    device: str = ""
    versions: dict[str, str] = {}
    finished: str = ""  # ISO date and time
    folder: str = ""  # of the sweep, relative to the file
    failed: str | None = None  # why there is no result

    @property
    def scored(self) -> bool:
        """Whether there is a test score."""
        return self.failed is None and has_main_score(self.test)

    @property
    def metric(self) -> str:
        """The score that decides: top1, or mAP of several labels an image; of a result that is scored."""
        return metric_of(self.test)

    @property
    def main(self) -> Spread:
        """That score on test."""
        return self.test[self.metric]

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.protocol is None and self.failed is None:
            raise ValueError("protocol is missing: only a failed result may lack it")
        return self


def append(file: Path, result: Result) -> None:
    """Add a line, whole or not at all; after a line that a power cut or a full disk left unfinished, on a new one.

    Raises UserError where it cannot be written.
    """
    text = json.dumps(result.model_dump(mode="json")) + "\n"
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            lock_descriptor(descriptor)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                text = "\n" + text
            data = text.encode()
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); fix that, then run the same command again"
        ) from error


def read(file: Path) -> tuple[list[Result], list[str]]:
    """All results, the latest of each task and method, and warnings about unreadable lines."""
    found: dict[tuple[str, ...], Result] = {}
    wrong = []
    for number, line in _lines(file):
        try:
            result = Result.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(key) for key in first["loc"])
            wrong.append(f"{file}:{number}: {f'{where}: ' if where else ''}{first['msg']}; left out, the rest is read")
            continue
        key = identity(result)
        found.pop(key, None)
        found.pop(key[:4], None)  # a failure, which has no storage
        found[key] = result
    return list(found.values()), wrong


def finished_runs(file: Path) -> set[str]:
    """Hashes of the recipes (``Result.run``) that have a result; none where there is no file yet."""
    return {result.run for result in read(file)[0] if not result.failed} if file.is_file() else set()


def identity(result: Result) -> tuple[str, ...]:
    """Key of a result: a later result with an equal key replaces an earlier one, which may have failed."""
    storage = result.protocol.storage.split()[:1] if result.protocol else []
    return (result.task, result.method, result.backbone, result.run, *storage)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a folder with a {FILE}") from error
    yield from ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation over seeds. Raises ValueError for values that are not finite."""
    return Spread(**mean_and_std(values), values=tuple(values))


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation (n - 1; 0 for one value and where the mean is not finite)."""
    mean = statistics.fmean(values)
    std = statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else 0.0
    return {"mean": mean, "std": std}
