"""The tasks: one row each, with where its images are and how its published numbers were made."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from dist_vpt.errors import UserError, nearest

Format = Literal["digits", "shapes", "tfds", "vtab_folder", "fgvc_json", "image_folder", "hf", "table", "webdataset"]
Interpolation = Literal["vpt", "bilinear", "bicubic"]
CropMode = Literal["squash", "crop"]
Normalize = Literal["vpt", "weights", "none"]
Augment = Literal["none", "fgvc"]
Cache = Literal["none", "memory"]
Exif = Literal["transpose", "ignore"]
Labels = Literal["single", "multiple"]
METRICS: dict[Labels, str] = {"single": "top1", "multiple": "mAP"}  # the score that decides, in percent
STEP_SCORES: dict[Labels, str] = {"single": "top1", "multiple": "label_accuracy"}  # of a step, which has no mAP
EMBEDDED: dict[Format, str] = {  # formats that need no folder, and why
    "digits": "digits come with scikit-learn",
    "shapes": "shapes are drawn by the package",
}


class Part(NamedTuple):
    """A part of a dataset's split: of its n examples those from start * n // 100 to stop * n // 100."""

    split: str
    start: int = 0  # percent
    stop: int = 100  # percent
    first: int | None = None  # only this many of these

    def bounds(self, n: int) -> tuple[int, int]:
        """Its first example among n, and the one after its last."""
        start, stop = self.start * n // 100, self.stop * n // 100
        return start, stop if self.first is None else min(stop, start + self.first)


@dataclass(frozen=True)
class Tfds:
    """Where a task's images and labels are in TensorFlow Datasets."""

    builder: str  # name, or name/configuration
    version: str  # that the published numbers were made with
    train: Part
    val: Part
    test: Part
    label: str = "label"  # the feature, or a row of tfds.LABELS


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dataset and the protocol under which its numbers are published."""

    name: str  # the row's name, or the one that the recipe gives
    format: Format  # how the dataset is stored
    labels: Labels = "single"  # multiple: an image has any number of labels
    classes: int | None = None  # number of classes the storage must have; None: any number
    group: str | None = None  # natural, specialized, structured (VTAB-1k) or fgvc
    interpolation: Interpolation | None = None  # kernel; None: as in the backbone's pretraining
    crop_mode: CropMode = "crop"  # squash to a square, or resize the shorter side, then center crop
    normalize: Normalize = "weights"  # mean and std: ImageNet's (vpt), as in the backbone's pretraining, or 0 and 1
    augment: Augment = "none"  # fgvc: random crop and flip in training
    cache: Cache = "none"  # memory: decode each image of train and val once per process
    exif: Exif = "ignore"  # orientation: ignore, as the published loaders of VTAB and FGVC do, or transpose
    background: str = "none"  # color under transparent images; none: alpha is dropped, as those loaders do
    expected_counts: tuple[tuple[str, int], ...] = ()  # images in the published splits
    allow_missing_classes: bool = False  # train is so small that it may lack images of some classes
    folders: tuple[str, ...] = ()  # possible names of the dataset's folder
    tfds: Tfds | None = None
    prompts: int | None = None  # prompts of a block in the paper (VPT-deep, ViT-B/16, arXiv 2203.12119)
    queries: int | None = None  # queries of a block in the paper (arXiv 2212.03220)

    @property
    def metric(self) -> str:
        """The score by which epochs and trials are chosen."""
        return METRICS[self.labels]


def _vtab(
    name: str, group: str, classes: int, test: int, tfds: Tfds, *, prompts: int, queries: int = 1, folder: str = ""
) -> Task:
    return Task(
        name=name,
        format="tfds",
        classes=classes,
        group=group,
        interpolation="vpt",
        crop_mode="squash",
        normalize="vpt",
        expected_counts=(("train", 800), ("val", 200), ("trainval", 1000), ("test", test)),
        allow_missing_classes=True,
        folders=(folder, name) if folder else (name,),
        tfds=tfds,
        prompts=prompts,
        queries=queries,
    )


def _tfds(  # noqa: PLR0917 (a row of a table)
    builder: str, version: str, train: Part, val: Part, test: Part, label: str = "label"
) -> Tfds:
    """Every VTAB-1k task trains on the first 800 of its pool and selects on the first 200 of another one."""
    return Tfds(builder, version, train._replace(first=800), val._replace(first=200), test, label)


TRAIN, VAL, TEST = Part("train"), Part("validation"), Part("test")
CLEVR = Part("train", 0, 90), Part("train", 90), VAL
DSPRITES = Part("train", 0, 80), Part("train", 80, 90), Part("train", 90)
SMALLNORB = TRAIN, Part("test", 0, 50), Part("test", 50)
SIXTY = Part("train", 0, 60), Part("train", 60, 80), Part("train", 80)


def _fgvc(name: str, classes: int, test: int, *folders: str, prompts: int) -> Task:
    return Task(
        name=name,
        format="fgvc_json",
        classes=classes,
        group="fgvc",
        interpolation="bilinear",
        normalize="vpt",
        augment="fgvc",
        expected_counts=(("test", test),),
        folders=(*folders, name),
        prompts=prompts,
    )


def _shapes(name: str) -> Task:
    return Task(
        name=name,
        format="shapes",
        classes=16,
        crop_mode="squash",
        cache="memory",
        expected_counts=(("train", 800), ("val", 200), ("trainval", 1000), ("test", 1000)),
    )


# Tasks of the package itself, VTAB-1k (Zhai et al., arXiv 1910.04867) in the order of VPT's tables, then the five FGVC
# sets of VPT.
_TASKS = (
    Task(name="digits", format="digits", classes=10, crop_mode="squash", cache="memory"),
    _shapes("shapes_ori"),
    _shapes("shapes_loc"),
    _vtab(
        "cifar100", "natural", 100, 10000, folder="cifar", prompts=10,
        tfds=_tfds("cifar100", "3.*.*", Part("train", 0, 90), Part("train", 90), TEST),
    ),
    _vtab(
        "caltech101", "natural", 102, 6084, prompts=10,
        tfds=_tfds("caltech101", "3.*.*", Part("train", 0, 90), Part("train", 90), TEST),
    ),
    _vtab("dtd", "natural", 47, 1880, prompts=10, tfds=_tfds("dtd", "3.*.*", TRAIN, VAL, TEST)),
    _vtab(
        "oxford_flowers102", "natural", 102, 6149, prompts=1,
        tfds=_tfds("oxford_flowers102", "2.*.*", TRAIN, VAL, TEST),
    ),
    _vtab(
        "oxford_iiit_pet", "natural", 37, 3669, prompts=1,
        tfds=_tfds("oxford_iiit_pet", "3.2.0", Part("train", 0, 80), Part("train", 80), TEST),
    ),
    _vtab(
        "svhn", "natural", 10, 26032, prompts=50, queries=20,
        tfds=_tfds("svhn_cropped", "3.*.*", Part("train", 0, 90), Part("train", 90), TEST),
    ),
    _vtab("sun397", "natural", 397, 21750, prompts=5, tfds=_tfds("sun397/tfds", "4.*.*", TRAIN, VAL, TEST)),
    _vtab(
        "patch_camelyon", "specialized", 2, 32768, prompts=100,
        tfds=_tfds("patch_camelyon", "2.*.*", TRAIN, VAL, TEST),
    ),
    _vtab("eurosat", "specialized", 10, 5400, prompts=100, tfds=_tfds("eurosat/rgb", "2.*.*", *SIXTY)),
    _vtab("resisc45", "specialized", 45, 6300, prompts=10, tfds=_tfds("resisc45", "3.*.*", *SIXTY)),
    _vtab(
        "diabetic_retinopathy", "specialized", 5, 42670, prompts=1,
        tfds=_tfds("diabetic_retinopathy_detection/btgraham-300", "3.*.*", TRAIN, VAL, TEST),
    ),
    _vtab("clevr_count", "structured", 8, 15000, prompts=100, tfds=_tfds("clevr", "3.*.*", *CLEVR, "clevr_count")),
    _vtab(
        "clevr_dist", "structured", 6, 15000, prompts=200, queries=10,
        tfds=_tfds("clevr", "3.*.*", *CLEVR, "clevr_dist"),
    ),
    _vtab(
        "dmlab", "structured", 6, 22735, prompts=100, queries=20, tfds=_tfds("dmlab", "2.0.1", TRAIN, VAL, TEST)
    ),
    _vtab(
        "kitti", "structured", 4, 711, prompts=100, queries=20,
        tfds=_tfds("kitti", "3.2.0", TRAIN, VAL, TEST, "kitti"),
    ),
    _vtab(
        "dsprites_loc", "structured", 16, 73728, prompts=100, queries=20,
        tfds=_tfds("dsprites", "2.*.*", *DSPRITES, "dsprites_loc"),
    ),
    _vtab(
        "dsprites_ori", "structured", 16, 73728, prompts=100,
        tfds=_tfds("dsprites", "2.*.*", *DSPRITES, "dsprites_ori"),
    ),
    _vtab(
        "smallnorb_azi", "structured", 18, 12150, prompts=200, queries=20,
        tfds=_tfds("smallnorb", "2.*.*", *SMALLNORB, "label_azimuth"),
    ),
    _vtab(
        "smallnorb_ele", "structured", 9, 12150, prompts=200, queries=10,
        tfds=_tfds("smallnorb", "2.*.*", *SMALLNORB, "label_elevation"),
    ),
    _fgvc("cub", 200, 5794, "CUB_200_2011", prompts=10),
    _fgvc("nabirds", 555, 24633, prompts=50),
    _fgvc("oxford_flowers", 102, 6149, "OxfordFlower", "OxfordFlowers", prompts=5),
    _fgvc("stanford_dogs", 120, 8580, "Stanford-dogs", "StanfordDogs", prompts=100),
    _fgvc("stanford_cars", 196, 8041, "Stanford-cars", "StanfordCars", prompts=200),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
# Defaults, by storage format, of tasks that are not in the table.
FORMAT_TASKS: dict[Format, Task] = {
    "digits": Task(name="", format="digits", classes=10, crop_mode="squash", cache="memory"),
    "vtab_folder": Task(name="", format="vtab_folder", crop_mode="squash", exif="transpose", background="white"),
    "fgvc_json": Task(name="", format="fgvc_json", augment="fgvc", exif="transpose", background="white"),
    "image_folder": Task(name="", format="image_folder", exif="transpose", background="white"),
    "hf": Task(name="", format="hf", exif="transpose", background="white"),
    "webdataset": Task(name="", format="webdataset", exif="transpose", background="white"),
    "table": Task(name="", format="table", exif="transpose", background="white"),
}


def published_task(name: str, *, embedded: bool = False) -> Task:
    """A task of VTAB-1k or FGVC, or with ``embedded`` one of the package, by name. Raises UserError."""
    known = {task.name: task for task in TASKS.values() if task.group or (embedded and task.format in EMBEDDED)}
    if name not in known:
        raise UserError(f"{name}: no such task; {nearest(name, known)}")
    return known[name]
