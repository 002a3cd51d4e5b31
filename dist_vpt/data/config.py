"""The data section of a recipe: which task, where it is stored, how its images are transformed."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dist_vpt.data.addresses import is_address, mistake_in_root, shown
from dist_vpt.data.config_hf import HfConfig
from dist_vpt.data.config_table import TableConfig
from dist_vpt.data.config_webdataset import WebDatasetConfig
from dist_vpt.data.tasks import (
    EMBEDDED,
    FORMAT_TASKS,
    METRICS,
    STEP_SCORES,
    TASKS,
    Augment,
    Cache,
    CropMode,
    Exif,
    Format,
    Interpolation,
    Labels,
    Normalize,
    Task,
)
from dist_vpt.errors import nearest

# Formats that split off a fraction: the others have fixed splits.
READS_VAL_FRACTION = ("fgvc_json", "image_folder", "hf", "table", "webdataset")
READS_TEST_FRACTION = ("image_folder", "hf", "table", "webdataset")

VAL_SHOTS = 4  # images of a class of val that are used with data.shots, at most

Channels = tuple[float, float, float]
PositiveChannels = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


def _color(value: str) -> str:
    from PIL import ImageColor

    try:
        known = value == "none" or len(ImageColor.getrgb(value)) == 3
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{value!r}: must be none, the name of a color or #rrggbb; use white")
    return value


def _extra_name(value: str) -> str:
    if value in ("train", "val", "trainval", "test") or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", value):
        raise ValueError(f"{value!r}: must be letters, digits and . + - _, and not the name of a split; use imagenet-r")
    return value


Color = Annotated[str, AfterValidator(_color)]

RAND_AUGMENT = re.compile(r"^rand(-(m\d{1,2}|n[1-9]|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d?|inc[01]))*$")


def _policy(value: str) -> str:
    if not RAND_AUGMENT.match(value):
        raise ValueError(
            f"{value!r}: must be rand and timm's settings: mN (magnitude), nN (operations), pP (probability of each), "
            "mstdS (deviation of the magnitude), mmaxN (its maximum), incI (1: operations that grow with it), joined "
            "by hyphens; use rand-m9-mstd0.5-inc1"
        )
    return value


RandAugment = Annotated[str, AfterValidator(_policy), Field(json_schema_extra={"pattern": RAND_AUGMENT.pattern})]


class DataConfig(BaseModel):
    """A task, its storage and the transform of its images."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: str = Field(default="digits", description="a known task, or any name where format and root are given")
    format: Format | None = Field(default=None, description="storage format; null: the task's")
    labels: Labels = Field(
        default="single",
        description="labels of an image: single: one; multiple: any number of them, each class a yes or no of its own "
        "(binary cross entropy, mAP, a threshold for each class)",
    )
    root: str | None = Field(
        default=None,
        description="folder of the dataset, or the folder with the datasets of known tasks, relative to the working "
        "directory; hf: a folder or a hub id; table: the file, or the folder with one or with one for each split; "
        "webdataset, and hf with streaming: also an address (https://, hf://, s3://, ...)",
    )
    train_on: Literal["train", "trainval"] = Field(default="train", description="the split that is trained on")
    fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="part of train that is used, 0 to 1, drawn by split_seed in proportion to the classes; fgvc_json: "
        "that of train_PERCENT.json if the file exists",
    )
    shots: int | None = Field(
        default=None,
        ge=1,
        description="images of each class of train that are used, and at most 4 of val, drawn by split_seed; a sweep "
        "then trains its seeds on train alone; null: all",
    )
    tries: int = Field(
        default=1,
        ge=1,
        description="draws of shots or fraction over which `sweep` and `suite` report mean and standard deviation, "
        "each trained with the next of sweep.seeds; 1: one draw for all seeds",
    )
    try_index: int = Field(default=0, ge=0, description="which draw of shots or fraction is used, counted from 0")
    val_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="part of the images split off for val, 0 to 1, where the storage has no val",
    )
    test_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="part of the images split off for test, 0 to 1, where the storage has no test",
    )
    split_seed: int = Field(default=0, ge=0, description="seed of the splits that are split off")
    image_size: int | None = Field(
        default=None,
        ge=8,
        le=4096,
        description="side of the square image in pixels; null: that of the backbone's pretraining",
    )
    interpolation: Interpolation | None = Field(
        default=None,
        description="kernel; vpt: the published VPT loader's (TensorFlow 1's bilinear); null: the task's, "
        "then that of the backbone's pretraining",
    )
    crop_mode: CropMode | None = Field(
        default=None,
        description="squash to a square, or resize the shorter side and crop; null: the task's",
    )
    normalize: Normalize | None = Field(
        default=None,
        description="mean and std of the channels; vpt: ImageNet's, weights: those of the backbone's pretraining, "
        "none: 0 and 1; null: the task's",
    )
    mean: Channels | None = Field(
        default=None, description="mean of the channels, of pixels in 0..1; replaces normalize"
    )
    std: PositiveChannels | None = Field(
        default=None, description="standard deviation of the channels, of pixels in 0..1; replaces normalize"
    )
    augment: Augment | None = Field(
        default=None, description="fgvc: random crop and flip in training; null: the task's"
    )
    rand_augment: RandAugment | None = Field(
        default=None,
        description="RandAugment in training (Cubuk et al. 2020, arXiv 1909.13719), after crop and flip: a policy of "
        "timm, such as rand-m9-mstd0.5-inc1; null: none",
    )
    random_erasing: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="probability, 0 to 1, with which a box of a training image is erased (Zhong et al. 2020, arXiv "
        "1708.04896; timm's RandomErasing)",
    )
    random_erasing_mode: Literal["const", "rand", "pixel"] = Field(
        default="pixel",
        description="random_erasing: what fills the box: const: the mean; rand: one normal draw per channel; pixel: "
        "one per pixel and channel",
    )
    test_crops: Literal[1, 2, 5, 10] = Field(
        default=1,
        description="views of an image in evaluation and prediction, whose logits are averaged (Krizhevsky et al. "
        "2012, section 4.1): 1; 2: with its mirror image; 5: center and corners of the larger picture of crop_mode; "
        "10: with their mirror images",
    )
    cache: Cache | None = Field(
        default=None,
        description="memory: decode and resize each image once per process, and augment it in each epoch; null: the "
        "task's, but none with rand_augment, for which workers are needed",
    )
    workers: int = Field(default=2, ge=0, description="processes that load images, for each training process")
    on_decode_error: Literal["fail", "skip"] = Field(
        default="fail",
        description="skip: an unreadable image is reported and has no weight; fail: it stops the run",
    )
    absent_classes: Literal["fail", "allow"] | None = Field(
        default=None,
        description="allow: classes may have no image in the split that is trained on; null: fail, except for "
        "the small splits of VTAB-1k",
    )
    check_counts: bool = Field(
        default=True, description="false: the splits of a known task may have other numbers of images than published"
    )
    exif: Exif | None = Field(
        default=None,
        description="transpose: turn images by their EXIF orientation; ignore: leave them as they are stored; null: "
        "ignore for tasks with published numbers, transpose for your own data",
    )
    background: Color | None = Field(
        default=None,
        description="color onto which transparent images are composed, as a name or '#rrggbb'; none: drop the alpha "
        "channel; null: none for tasks with published numbers, white for your own data",
    )
    check_leaks: bool = Field(
        default=True,
        description="of your own data: warn of files in test that are in train or val too, byte for byte",
    )
    extra_tests: dict[Annotated[str, AfterValidator(_extra_name)], str] = Field(
        default_factory=dict,
        description="name -> folder of class folders, some or all of the task's classes, as of ImageNet-R, -A or "
        "-Sketch (of ImageNet-C: CORRUPTION/SEVERITY/CLASS): extra test sets, scored once where test is, among the "
        "classes that they have",
    )
    streaming: bool = Field(
        default=False,
        description="hf: read Parquet files where they are, a row group at a time, in place of downloading the "
        "dataset; WebDataset shards behind addresses are streamed without it",
    )
    streaming_disk_gib: float = Field(
        default=20.0,
        gt=0,
        description="streamed data: GiB of the cache folder's disk that fetched pieces take at most, for all processes "
        "of a machine together",
    )
    streaming_shuffle: int = Field(
        default=10_000, ge=1, description="streamed data: images of train that are shuffled with each other"
    )
    max_megapixels: float = Field(default=178.0, gt=0, description="largest image that is decoded, in million pixels")
    hf: HfConfig = Field(default=HfConfig(), description="settings of Hugging Face datasets")
    table: TableConfig = Field(default=TableConfig(), description="settings of tables of image paths and labels")
    webdataset: WebDatasetConfig = Field(default=WebDatasetConfig(), description="settings of WebDataset shards")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def stored(self) -> Format | None:
        """The storage format, or None if there is none for the task. Files of VTAB-1k may be found in another one."""
        return self.format or (TASKS[self.task].format if self.task in TASKS else None)

    @property
    def metric(self) -> str:
        """The score by which epochs and trials are chosen, as of ``Task.metric``."""
        return METRICS[self.labels]

    @property
    def step_score(self) -> str:
        """The score of a training step: of several labels an image the share of all yes and no that are right."""
        return STEP_SCORES[self.labels]

    @property
    def streamed(self) -> bool:
        """Whether images are fetched a piece at a time while they are trained on."""
        return self.streaming or (self.stored == "webdataset" and is_address(self.root))

    @property
    def draws(self) -> bool:
        """Whether only some images of train are used."""
        return self.shots is not None or self.fraction < 1

    def _mistakes(self) -> Iterator[str]:
        storage = self.stored
        if storage is None:
            yield (
                f"task = {self.task!r}: is not a known task ({nearest(self.task, TASKS)}); for your own dataset, set "
                "format and root as well"
            )
            return
        yield from self._mistakes_of_storage(storage)
        yield from self._mistakes_of_draws()
        if self.random_erasing_mode != "pixel" and not self.random_erasing:
            yield (
                f"random_erasing_mode = {self.random_erasing_mode}: nothing is erased; set random_erasing, or leave it "
                "out"
            )
        if (self.mean is None) != (self.std is None):
            yield "mean and std go together: set both or neither"
        if self.mean is not None and self.normalize is not None:
            yield f"normalize = {self.normalize!r}: mean and std replace it; set either"
        fields = type(self).model_fields
        for name, readers in (
            ("val_fraction", READS_VAL_FRACTION),
            ("test_fraction", READS_TEST_FRACTION),
        ):
            value = getattr(self, name)
            if storage not in readers and value != fields[name].default:
                yield f"{name} = {value}: format {storage!r} has fixed splits; remove {name}"
        if storage in READS_TEST_FRACTION and self.val_fraction + self.test_fraction >= 1:
            yield (
                f"val_fraction = {self.val_fraction}, test_fraction = {self.test_fraction}: their sum must be below 1 "
                "to leave images for train; lower one"
            )

    def _mistakes_of_draws(self) -> Iterator[str]:
        if self.shots is not None and self.labels == "multiple":
            yield f"shots = {self.shots}: an image with several labels is of several classes at once; use data.fraction"
        if self.shots is not None and self.fraction < 1:
            yield f"shots = {self.shots}, fraction = {self.fraction}: both say how much of train is used; set either"
        for name, unused in (("tries", 1), ("try_index", 0)):
            if (value := getattr(self, name)) != unused and not self.draws:
                yield f"{name} = {value}: without shots or fraction nothing is drawn; set one of them, or remove {name}"
        if self.tries > 1 and self.try_index > 0:
            yield f"tries = {self.tries}, try_index = {self.try_index}: several draws, or one of them; set either"

    def _mistakes_of_labels(self, storage: Format) -> Iterator[str]:
        if self.labels == "multiple" and storage != "table":
            yield f"labels = multiple: format {storage!r} has one label an image; use format table, or labels single"
        if self.labels == "multiple" and self.extra_tests:
            yield "extra_tests: class folders have one label an image, and labels = multiple; remove extra_tests"
        for name in ("labels", "separator") if self.labels == "single" else ():
            if getattr(self.table, name) is not None:
                yield f"table.{name}: is of several labels an image; set data.labels=multiple, or remove table.{name}"
        if self.table.labels and (self.table.label or self.table.separator):
            other = "label" if self.table.label else "separator"
            yield f"table.labels and table.{other}: a column for each class, or one for all labels; set either"

    def _mistakes_of_streaming(self, storage: Format) -> Iterator[str]:
        if self.streaming and storage != "hf":
            other = "shards behind addresses are streamed without it" if storage == "webdataset" else "use hf"
            yield f"streaming = true: only format hf uses it and the format is {storage!r}; remove streaming ({other})"
        if mistake := mistake_in_root(self.root):
            yield f"root = {shown(str(self.root))!r}: {mistake}"
        elif storage == "hf" and is_address(self.root) and not (self.streaming and self.hf.splits):
            yield (
                f"root = {shown(str(self.root))!r}: Parquet files behind an address are streamed, named for each "
                "split; set streaming=true and 'hf.splits={train: \"train-{00..09}.parquet\", ...}'"
            )
        for name in ("streaming_disk_gib", "streaming_shuffle"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and not self.streamed:
                yield f"{name} = {value}: nothing is streamed; set streaming=true (format hf), or remove {name}"

    def _mistakes_of_storage(self, storage: Format) -> Iterator[str]:
        if storage in EMBEDDED and self.root is not None:
            yield f"root = {self.root!r}: {EMBEDDED[storage]}; remove root or set format"
        if storage not in EMBEDDED and not self.root:
            what = "file of the table, or its folder" if storage == "table" else "folder of the dataset"
            yield f"root is missing: format {storage!r} needs the {what}; set root"
        for name in ("exif", "background") if storage in (*EMBEDDED, "tfds") else ():
            if getattr(self, name) is not None:
                yield f"{name} = {getattr(self, name)}: format {storage!r} has its images as published; remove {name}"
        if storage == "tfds" and (self.task not in TASKS or TASKS[self.task].tfds is None):
            known = [name for name, row in TASKS.items() if row.tfds]
            yield f"task = {self.task!r}: is not in TensorFlow Datasets; {nearest(self.task, known)}"
        if storage == "shapes" and (self.task not in TASKS or TASKS[self.task].format != "shapes"):
            known = [name for name, row in TASKS.items() if row.format == "shapes"]
            yield f"task = {self.task!r}: format shapes has {' and '.join(known)} alone; use one of them"
        if storage != "hf" and self.hf != HfConfig():
            yield f"hf: only format 'hf' uses it and the format is {storage!r}; remove hf or set format: hf"
        yield from self._mistakes_of_labels(storage)
        yield from self._mistakes_of_streaming(storage)
        if storage != "table" and self.table != TableConfig():
            yield f"table: only format 'table' uses it and the format is {storage!r}; remove table or set format: table"
        if storage != "webdataset" and self.webdataset != WebDatasetConfig():
            yield (
                f"webdataset: only format 'webdataset' uses it and the format is {storage!r}; remove webdataset or set "
                "format: webdataset"
            )


def resolve(recipe: DataConfig) -> Task:
    """The task's row, or the format's defaults for another name, with the recipe's settings on top."""
    if recipe.task in TASKS:
        task = TASKS[recipe.task]
    else:
        assert recipe.format is not None  # DataConfig requires a format for other names
        task = replace(FORMAT_TASKS[recipe.format], name=recipe.task)
    return replace(
        task,
        format=recipe.format or task.format,
        labels=recipe.labels,
        interpolation=recipe.interpolation or task.interpolation,
        crop_mode=recipe.crop_mode or task.crop_mode,
        normalize=recipe.normalize or task.normalize,
        augment=recipe.augment or task.augment,
        cache=recipe.cache or task.cache,
        exif=recipe.exif or task.exif,
        background=recipe.background or task.background,
        expected_counts=task.expected_counts if recipe.check_counts else (),
        allow_missing_classes=(
            task.allow_missing_classes if recipe.absent_classes is None else recipe.absent_classes == "allow"
        ),
    )
