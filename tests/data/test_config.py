"""The data recipe's rules and what a task makes of it."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.formats import FORMATS, open_splits
from dist_vpt.data.splits import Splits
from dist_vpt.data.tasks import FORMAT_TASKS, TASKS, Task
from dist_vpt.errors import DataError

OWN = {"task": "mine", "root": "somewhere"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "digit"}, "task = 'digit': is not a known task \\(did you mean 'digits'\\?\\).*set format and root"),
        ({"task": "mine", "format": "hf"}, "root is missing: format 'hf' needs the folder of the dataset; set root"),
        ({"root": "x"}, "root = 'x': digits come with scikit-learn; remove root or set format"),
        ({"task": "shapes_ori", "root": "x"}, "root = 'x': shapes are drawn by the package; remove root or set format"),
        ({"task": "shapes_loc", "exif": "ignore"}, "exif = ignore: format 'shapes' has its images as published"),
        (
            {"task": "mine", "format": "shapes"},
            "task = 'mine': format shapes has shapes_ori and shapes_loc alone; use",
        ),
        ({"format": "shapes"}, "task = 'digits': format shapes has shapes_ori and shapes_loc alone; use one of them"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std go together"),
        (
            {"mean": (0.5, 0.5, 0.5), "std": (1, 1, 1), "normalize": "vpt"},
            "normalize = 'vpt': mean and std replace it; set either",
        ),
        ({"task": "dtd"}, "root is missing: format 'tfds' needs the folder of the dataset; set root"),
        ({**OWN, "format": "tfds"}, "task = 'mine': is not in TensorFlow Datasets; "),
        ({"task": "dtdd", "root": "x"}, "task = 'dtdd': is not a known task \\(did you mean 'dtd'\\?\\)"),
        ({"shots": 4, "fraction": 0.5}, "shots = 4, fraction = 0.5: both say how much of train is used; set either"),
        ({"tries": 3}, "tries = 3: without shots or fraction nothing is drawn; set one of them, or remove tries"),
        ({"try_index": 1}, "try_index = 1: without shots or fraction nothing is drawn; set one of them, or remove try"),
        (
            {"shots": 1, "tries": 3, "try_index": 2},
            "tries = 3, try_index = 2: several draws, or one of them; set either",
        ),
        ({"shots": 0}, "shots\n.*greater than or equal to 1"),
        ({"fraction": 1.5}, "fraction\n.*less than or equal to 1"),
        ({"task": "cub", "root": "x", "fraction": 0.0}, "fraction\n.*greater than 0"),
        ({"mean": (0.5, 0.5, 0.5), "std": (1, 0, 1)}, "std.1\n.*greater than 0"),
        ({"val_fraction": 0.3}, "val_fraction = 0.3: format 'digits' has fixed splits; remove val_fraction"),
        ({**OWN, "format": "fgvc_json", "test_fraction": 0.3}, "test_fraction = 0.3: format 'fgvc_json' has"),
        (
            {**OWN, "format": "image_folder", "val_fraction": 0.5, "test_fraction": 0.5},
            "val_fraction = 0.5, test_fraction = 0.5: their sum must be below 1",
        ),
        ({"hf": {"image": "x"}}, "hf: only format 'hf' uses it and the format is 'digits'"),
        ({"table": {"label": "x"}}, "table: only format 'table' uses it and the format is 'digits'"),
        (
            {"streaming": True},
            r"streaming = true: only format hf uses it and the format is 'digits'; remove streaming \(use hf\)",
        ),
        (
            {"format": "webdataset", "root": "https://h/d", "streaming": True},
            r"the format is 'webdataset'; remove streaming \(shards behind addresses are streamed without it\)",
        ),
        ({"streaming_shuffle": 5}, r"streaming_shuffle = 5: nothing is streamed; set streaming=true \(format hf\), or"),
        ({"streaming_disk_gib": 5}, "streaming_disk_gib = 5.0: nothing is streamed; set streaming=true"),
        (
            {"format": "hf", "root": "https://h/d"},
            "root = 'https://h/d': Parquet files behind an address are streamed, named for each split; set streaming",
        ),
        ({"webdataset": {"label": "x"}}, "webdataset: only format 'webdataset' uses it and the format is 'digits'"),
        ({"task": "mine", "format": "table"}, "root is missing: format 'table' needs the file of the table, or its fo"),
        ({"hf": {"color": "x"}}, "hf.color\n.*not permitted"),
        ({"batch": 3}, "batch\n.*not permitted"),
        ({"image_size": 4}, "image_size\n.*greater than or equal to 8"),
        ({"workers": -1}, "workers\n.*greater than or equal to 0"),
        ({"max_megapixels": 0}, "max_megapixels\n.*greater than 0"),
        ({"on_decode_error": "ignore"}, "on_decode_error\n.*'fail' or 'skip'"),
    ],
)
def test_mistake_is_reported(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


def test_fraction_that_is_not_read_does_not_count():
    assert DataConfig(**OWN, format="fgvc_json", val_fraction=0.9).val_fraction == 0.9


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ValidationError) as caught:
        DataConfig(root="x", mean=(0, 0, 0), val_fraction=0.2)
    assert all(word in str(caught.value) for word in ("root = 'x'", "mean and std", "val_fraction = 0.2"))


def test_dumped_recipe_loads_again():
    recipe = DataConfig(task="mine", format="hf", root="x", hf={"splits": {"val": "train[:5]"}})
    assert DataConfig(**recipe.model_dump()) == recipe
    assert DataConfig(**DataConfig().model_dump()) == DataConfig()


def test_every_field_is_described():
    for model in (DataConfig, type(DataConfig().hf)):
        assert all(field.description for field in model.model_fields.values())


def test_row_gives_what_the_recipe_leaves_open():
    assert resolve(DataConfig()) == TASKS["digits"]
    assert resolve(DataConfig(cache="none", crop_mode="crop", interpolation="vpt", normalize="none")) == Task(
        name="digits",
        format="digits",
        classes=10,
        crop_mode="crop",
        cache="none",
        interpolation="vpt",
        normalize="none",
    )


def test_format_gives_it_for_a_free_name():
    def of(storage):
        task = resolve(DataConfig(**OWN, format=storage))
        assert (task.name, task.format, task.classes) == ("mine", storage, None)
        return task.crop_mode, task.augment, task.cache

    assert of("vtab_folder") == ("squash", "none", "none")
    assert of("fgvc_json") == ("crop", "fgvc", "none")
    assert of("image_folder") == of("hf") == of("table") == of("webdataset") == ("crop", "none", "none")


def test_every_format_can_be_opened_and_has_defaults():
    assert FORMATS.keys() == {*FORMAT_TASKS, "tfds", "shapes"}  # the last two have known tasks only


def test_number_of_classes_must_be_the_tasks(monkeypatch):
    monkeypatch.setitem(TASKS, "digits", Task(name="digits", format="digits", classes=11))
    with pytest.raises(DataError, match="digits: 10 classes, but task 'digits' has 11; complete the dataset"):
        open_splits(DataConfig())


def test_recipe_and_table_need_no_torch():
    code = "import sys, dist_vpt.data; assert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_are_opened():
    assert isinstance(open_splits(DataConfig()), Splits)
