"""`dist-vpt report`: tables whose numbers are worked out by hand, in four forms, and what stands beside a number."""

import csv
import io
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dist_vpt.cli.main import main
from dist_vpt.data.tasks import TASKS
from dist_vpt.errors import UserError
from dist_vpt.report.comparison import Cell, ResultRow, Table, _letters, compare
from dist_vpt.report.csv import csv_text
from dist_vpt.report.figures import figures
from dist_vpt.report.html import html
from dist_vpt.report.legend import sources
from dist_vpt.report.local import ABSENT, LocalResult
from dist_vpt.report.markdown import markdown
from dist_vpt.report.published import Published, published
from dist_vpt.report.tables import forms, gather, show
from dist_vpt.runs.results import Parameters, Protocol, Result, append, spread

NATURAL = ("cifar100", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397")
SPECIALIZED = ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy")
STRUCTURED = (
    *("clevr_count", "clevr_dist", "dmlab", "kitti"),
    *("dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele"),
)
VTAB = (*NATURAL, *SPECIALIZED, *STRUCTURED)
FGVC = ("cub", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars")
# Natural 10 to 70: mean 40. Specialized 50. Structured 30. Mean of groups 40; of 19: (280 + 200 + 240) / 19 = 37.89.
BY_HAND = dict(zip(VTAB, [10.0, 20, 30, 40, 50, 60, 70, *[50.0] * 4, *[30.0] * 8], strict=True))
MEANS = {
    "mean of 7 natural": 40.0,
    "mean of 4 specialized": 50.0,
    "mean of 8 structured": 30.0,
    "mean of 3 groups": 40.0,
    "mean of 19": pytest.approx(720 / 19),
}


def protocol(task: str, **changes: Any) -> Protocol:
    """As published."""
    fgvc = task in FGVC
    facts = {
        "storage": "fgvc_json" if fgvc else f"tfds {task}:3.0.1 (array_record)",
        "resize": "bilinear" if fgvc else "vpt",
        "fit": "crop" if fgvc else "squash",
        "normalize": "vpt",
        "augment": "fgvc" if fgvc else "none",
        "image_size": 224,
        "counts": dict(TASKS[task].expected_counts) if task in TASKS else {},
        "trials": 20,
        "epochs": 100,
    }
    return Protocol.model_validate(facts | changes)


def result(task: str, *values: float, method: str = "vqt", **changes: Any) -> Result:
    """One task's result; keys of its protocol among the changes."""
    of_protocol = {key: changes.pop(key) for key in list(changes) if key in Protocol.model_fields}
    facts = {
        "run": f"{task}-{method}",
        "task": task,
        "group": TASKS[task].group if task in TASKS else None,
        "method": method,
        "backbone": "vit",
        "precision": "bf16",
        "protocol": protocol(task, **of_protocol),
        "test": {"top1": spread(values)} if values else {},
        "finished": "2026-11-20T12:00:00+00:00",
    }
    return Result.model_validate(facts | changes)


def local(*results: Result, folder: str = "runs") -> list[LocalResult]:
    return [LocalResult(folder, each) for each in results]


def suite(method: str = "vqt", **changes: Any) -> list[LocalResult]:
    """All of VTAB-1k."""
    return local(*(result(task, value, method=method, **changes) for task, value in BY_HAND.items()))


def one_table(results: Sequence[LocalResult], rows: Sequence[Published] = ()) -> Table:
    (table,) = compare(results, rows)
    return table


def cells(table: Table, row: int = 0) -> dict[str, Cell]:
    return dict(zip([column.label for column in table.columns], table.rows[row].cells, strict=True))


def notes_of(table: Table, part: ResultRow | Cell) -> set[str]:
    """The texts below the table to which the marks of a row or cell point."""
    texts = {mark: note for note, mark in table.notes.items()}
    return {texts[mark] for mark in part.marks.split(",") if mark}


def write(folder: Path, *results: Result) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for each in results:
        append(folder / "results.jsonl", each)
    return folder


# Numbers


def test_columns_are_the_tasks_in_the_papers_order_with_their_means() -> None:
    table = one_table(suite())
    assert [column.label for column in table.columns] == [
        *(*NATURAL, "mean of 7 natural", *SPECIALIZED, "mean of 4 specialized"),
        *(*STRUCTURED, "mean of 8 structured", "mean of 3 groups", "mean of 19"),
    ]
    groups = Counter(column.group for column in table.columns)
    assert groups == {"Natural": 8, "Specialized": 5, "Structured": 9, "All": 2}


def test_means_by_hand() -> None:
    found = cells(one_table(suite()))
    assert {name: found[name].mean for name in MEANS} == MEANS
    assert {task: found[task].mean for task in VTAB} == BY_HAND
    assert found["mean of 19"].number == "37.9"


def test_the_mean_of_groups_is_not_that_of_all_tasks() -> None:
    lopsided = local(*(result(task, 100.0 if task in SPECIALIZED else 0.0) for task in VTAB))
    found = cells(one_table(lopsided))
    assert found["mean of 3 groups"].mean == pytest.approx(100 / 3)
    assert found["mean of 19"].mean == pytest.approx(400 / 19)


def test_a_mean_is_shown_only_where_all_of_its_tasks_are_there() -> None:
    there = [each for each in suite() if each.result.task not in ("dtd", "svhn", "kitti")]
    found = cells(one_table(there))
    assert (found["dtd"].mean, found["dtd"].number) == (None, ABSENT)
    assert found["mean of 7 natural"].number == "5/7"
    assert found["mean of 4 specialized"].mean == 50.0
    assert found["mean of 8 structured"].number == "7/8"
    assert found["mean of 3 groups"].number == found["mean of 19"].number == "16/19"


def test_a_failed_task_has_its_reason_below_the_table() -> None:
    results = suite()
    results[2] = LocalResult("runs", result("dtd", failed="out of memory:\n  12 GiB asked for"))
    table = one_table(results)
    found = cells(table)
    assert (found["dtd"].mean, found["dtd"].number) == (None, "failed")
    assert found["mean of 7 natural"].number == "6/7"
    assert table.remarks == ["dtd, vqt: failed: out of memory: 12 GiB asked for"]


def test_a_result_without_a_test_score_is_a_failure() -> None:
    table = one_table(local(result("dtd", test={"loss": spread([1.0])})))
    assert cells(table)["dtd"].number == "failed"
    assert table.remarks == ["dtd, vqt: failed: no test score"]


def test_mean_and_spread_over_seeds() -> None:
    table = one_table(local(result("dtd", 50.0, 52.0, 54.0), result("svhn", 61.25)))
    found = cells(table)
    assert (found["dtd"].number, found["dtd"].spread) == ("52.0", "2.0")  # squares 4 + 0 + 4, over 2
    assert (found["svhn"].number, found["svhn"].spread) == ("61.2", "")  # one seed has no spread
    assert table.rows[0].seeds == "1 to 3"
    assert one_table(suite()).rows[0].seeds == "1"


def test_the_best_local_number_of_a_column_is_marked_as_far_as_it_shows() -> None:
    pairs = {"dtd": (60.04, 60.01, 59.0), "svhn": (70.0, 80.0, 75.0), "kitti": (50.0,)}
    methods = ("linear", "vqt", "mlp")
    results = [
        result(task, value, method=method)
        for task, values in pairs.items()
        for method, value in zip(methods, values, strict=False)
    ]
    high = Published("vqt", "vqt", "A", "B", "C", True, "", "vit", dict.fromkeys(VTAB, 99.0), None)
    table = one_table(local(*results), [high])
    best = {row.name + row.source: {task for task in pairs if cells(table, at)[task].best} for at, row in _rows(table)}
    assert best == {"linearlocal": {"dtd"}, "vqtlocal": {"dtd", "svhn"}, "vqtA": set(), "mlplocal": set()}


def _rows(table: Table) -> list[tuple[int, ResultRow]]:
    return list(enumerate(table.rows))


def test_three_tables() -> None:
    fgvc = local(*(result(task, value) for task, value in zip(FGVC, [80.0, 81, 82, 83, 94], strict=True)))
    tables = compare(local(result("digits", 97.0), result("mine", 50.0, 60.0)) + fgvc + suite(), published())
    assert [table.title for table in tables] == ["VTAB-1k", "FGVC", "Other tasks"]
    assert cells(tables[1])["mean of 5"].mean == 84.0
    assert [column.label for column in tables[2].columns] == ["digits", "mine"]
    assert [cell.number for cell in tables[2].rows[0].cells] == ["97.0", "55.0"]
    assert [table.title for table in compare(fgvc, [])] == ["FGVC"]


# Notes


def test_a_cell_under_another_protocol_is_marked_and_so_are_its_means() -> None:
    results = suite()
    results[14] = LocalResult("runs", result("kitti", 30.0, resize="bicubic", trials=4))
    table = one_table(results)
    found = cells(table)
    expected = {"not as published: resize bicubic, not vpt", "unlike the rest of the row: trials 4, not 20"}
    assert len(table.rows) == 1
    assert notes_of(table, found["kitti"]) == expected
    marked = {name for name, cell in found.items() if cell.marks}
    assert marked == {"kitti", "mean of 8 structured", "mean of 3 groups", "mean of 19"}
    assert notes_of(table, found["mean of 19"]) == expected
    assert not table.rows[0].marks


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"resize": "bicubic"}, "not as published: resize bicubic, not vpt"),
        ({"fit": "crop"}, "not as published: fit crop, not squash"),
        ({"normalize": "weights"}, "not as published: normalize weights, not vpt"),
        ({"epochs": 30}, "not as published: epochs 30, not 100"),
        ({"search": "halving"}, "not as published: search halving, not grid"),
        ({"image_size": 98}, "not as published: image size 98, not 224"),
        ({"storage": "vtab_folder"}, "not as published: images from vtab_folder, not tfds"),
        ({"notes": ("the dataset has another version",)}, "the dataset has another version"),
    ],
    ids=str,
)
def test_what_holds_for_a_whole_row_is_noted_once(changes: dict[str, Any], expected: str) -> None:
    table = one_table(suite(**changes))
    assert notes_of(table, table.rows[0]) == {expected}
    assert table.notes == {expected: "a"}
    assert not any(cell.marks for cell in table.rows[0].cells)


def test_another_number_of_images_than_published() -> None:
    counts = {"train": 800, "val": 200, "trainval": 1000, "test": 1500}
    table = one_table(local(result("svhn", 1.0), result("dtd", 50.0, counts=counts)))
    assert notes_of(table, cells(table)["dtd"]) == {"not as published: 1,500 images in test, not 1,880"}
    assert not cells(table)["svhn"].marks


def test_as_published_has_no_note() -> None:
    tables = compare(suite() + local(*(result(task, 50.0) for task in FGVC)), [])
    assert [table.notes for table in tables] == [{}, {}]


def test_tasks_without_published_numbers_are_compared_with_the_row_alone() -> None:
    table = one_table(local(result("digits", 97.0, image_size=24), result("mine", 90.0, image_size=98)))
    assert table.notes == {"unlike the rest of the row: image size 98, not 24": "a"}
    assert cells(table)["mine"].marks == "a"


def test_a_note_of_one_task_is_its_own_alone() -> None:
    results = suite()
    results[2] = LocalResult("runs", result("dtd", 30.0, notes=("dtd has another version",)))
    table = one_table(results)
    assert notes_of(table, cells(table)["dtd"]) == {"dtd has another version"}
    assert list(table.notes) == ["dtd has another version"]


def test_the_rows_protocol_is_that_of_most_tasks() -> None:
    results = suite()
    results[0] = LocalResult("runs", result("cifar100", 10.0, trials=4))
    table = one_table(results)
    assert notes_of(table, cells(table)["cifar100"]) == {"unlike the rest of the row: trials 4, not 20"}
    assert not cells(table)["dtd"].marks


def test_what_a_row_lacks_comes_from_the_nearest_protocol() -> None:
    both = [result(task, 50.0, run=f"{task}-{size}", image_size=size) for size in (224, 98) for task in ("dtd", "svhn")]
    more = [LocalResult("more", result("kitti", 60.0, image_size=size)) for size in (224, 98)]
    for rest, at in zip(more, (0, 1), strict=True):
        table = one_table([*local(*both), rest])
        assert [row.name for row in table.rows] == ["vqt (image size 224)", "vqt (image size 98)"]
        assert ["kitti" in row.local for row in table.rows] == [at == 0, at == 1]


def test_equal_tasks_under_two_protocols_are_two_rows() -> None:
    table = one_table(suite() + suite(run="b2", resize="bicubic", epochs=30))
    assert [row.name for row in table.rows] == ["vqt (resize vpt, epochs 100)", "vqt (resize bicubic, epochs 30)"]
    assert [bool(row.marks) for row in table.rows] == [False, True]


def test_precisions_and_backbones_are_rows_of_their_own() -> None:
    results = [result("dtd", 1.0), result("dtd", 2.0, precision="fp32"), result("dtd", 3.0, backbone="large")]
    table = one_table(local(*results))
    assert [(row.name, row.backbone) for row in table.rows] == [
        ("vqt (bf16)", "vit"),
        ("vqt (fp32)", "vit"),
        ("vqt", "large"),
    ]


def test_files_are_put_together_where_their_tasks_differ() -> None:
    half, rest = suite()[:9], [LocalResult("more", each.result) for each in suite()[9:]]
    assert cells(one_table(half + rest))["mean of 19"].number == "37.9"
    twice = one_table(
        half + [LocalResult("more", each.result.model_copy(update={"run": "b2"})) for each in suite()[:9]]
    )
    assert [row.name for row in twice.rows] == ["vqt (runs)", "vqt (more)"]


def test_of_two_recipes_for_a_cell_the_newest_is_shown_and_the_other_named() -> None:
    new = result("dtd", 60.0, run="new", finished="2026-11-21T12:00:00+00:00")
    table = one_table(local(new, result("dtd", 50.0, run="old"), result("dtd", run="broken", failed="x")))
    assert cells(table)["dtd"].mean == 60.0
    assert table.remarks == ["dtd, vqt: run old in runs is not shown, as one of another recipe finished later"]


def test_a_failure_gives_way_to_a_number_under_its_protocol_alone() -> None:
    number = local(result("dtd", 50.0))
    later = "2026-11-22T12:00:00+00:00"
    repaired = one_table(number + local(result("dtd", run="b2", failed="x", finished=later), folder="other"))
    assert [[cell.number for cell in row.cells][2] for row in repaired.rows] == ["50.0"]
    assert repaired.remarks == []
    another = one_table(number + local(result("dtd", run="b2", failed="x", resize="bicubic")))
    assert [[cell.number for cell in row.cells][2] for row in another.rows] == ["50.0", "failed"]


def failure(task: str, **changes: Any) -> Result:
    """Before its data were read."""
    return result(task, run="b2", failed="no such folder", **changes).model_copy(update={"protocol": None})


def test_a_failure_without_a_protocol_stands_in_any_row() -> None:
    results = local(failure("dtd"), failure("svhn"), failure("kitti"), result("sun397", 1.0, trials=4)) + suite()[:2]
    table = one_table(results)
    found = cells(table)
    assert len(table.rows) == 1
    assert {task for task in VTAB if found[task].number == "failed"} == {"dtd", "svhn", "kitti"}
    assert notes_of(table, found["sun397"]) == {"unlike the rest of the row: trials 4, not 20"}
    assert table.remarks[0] == "dtd, vqt: failed: no such folder"
    alone = one_table(local(failure("dtd")))
    assert [len(text) > 100 for text in forms([alone], local(failure("dtd")), []).values()] == [True] * 3
    repaired = one_table([*local(failure("dtd")), *local(result("dtd", 50.0, resize="bicubic"), folder="more")])
    assert ([row.source for row in repaired.rows], cells(repaired)["dtd"].number) == (["local"], "50.0")
    precise = one_table(local(failure("dtd", precision="fp32"), result("dtd", 50.0)))
    assert [row.name for row in precise.rows] == ["vqt (fp32)", "vqt (bf16)"]


def test_marks_go_on_after_z() -> None:
    assert [_letters(number) for number in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]


# Published rows


@pytest.mark.parametrize(
    ("method", "means"),
    [
        ("full", (75.88, 83.36, 47.64)),
        ("linear", (68.93, 77.16, 26.84)),
        ("sidetune", (58.21, 68.12, 23.41)),
        ("bias", (73.30, 78.25, 44.09)),
        ("adapter", (70.39, 77.11, 33.43)),
        ("vpt_shallow", (76.81, 79.66, 46.98)),
        ("vpt_deep", (78.48, 82.43, 54.98)),
    ],
)
def test_published_rows_have_the_papers_group_means(method: str, means: tuple[float, ...]) -> None:
    """As printed in table 1 of arXiv 2203.12119; tasks are printed to one decimal."""
    row = next(row for row in published() if row.method == method and row.label == "VPT paper")
    for tasks, mean in zip((NATURAL, SPECIALIZED, STRUCTURED), means, strict=True):
        assert sum(row.top1[task] for task in tasks) / len(tasks) == pytest.approx(mean, abs=0.06)


def test_published_rows_are_whole_and_name_what_they_come_from() -> None:
    rows = published()
    labels = {"VPT paper": 13, "VQT paper": 4, "Unifying study": 16, "ComBo paper": 8}
    assert Counter(row.label for row in rows) == labels
    for row in rows:
        if row.label == "ComBo paper":
            assert row.top1 == {}
            assert set(row.groups) in ({"mean"}, {"natural", "specialized", "structured", "mean"})
        else:
            assert tuple(sorted(row.top1)) in (tuple(sorted(VTAB)), tuple(sorted(FGVC)))
            assert row.groups == {}
            assert row.backbone.startswith("ViT-B/16 supervised ImageNet-")
        assert all(0 < value < 100 for value in (row.top1 | row.groups).values())
        assert "arXiv" in row.source
        assert row.status


def test_the_count_of_trained_numbers_is_no_task() -> None:
    row = next(row for row in published() if row.label == "Unifying study" and row.method == "vpt_deep")
    assert row.trained == pytest.approx(430_000)
    assert len(row.top1) == 19
    assert sum(row.top1.values()) / 19 == pytest.approx(72.02, abs=0.01)  # 1368.3 / 19
    assert next(row for row in published() if row.method == "vqt").trained is None


def test_published_rows_of_own_methods_stand_below_them() -> None:
    table = one_table(suite("vqt") + suite("linear"), published())
    assert [(row.name, row.source) for row in table.rows] == [
        ("vqt", "local"),
        ("vqt", "VQT paper, unverified"),
        ("linear", "local"),
        ("linear", "VPT paper"),
        ("linear", "VQT paper, unverified"),
        ("linear", "Unifying study"),
        ("linear", "ComBo paper, unverified"),
    ]
    unverified, verified, differs = table.rows[1], table.rows[3], table.rows[5]
    assert [note.startswith("unverified (VQT paper)") for note in notes_of(table, unverified)] == [True]
    assert notes_of(table, verified) == set()
    assert [note.startswith("protocol differs (Unifying study): AdamW") for note in notes_of(table, differs)] == [True]
    assert verified.backbone == "ViT-B/16 supervised ImageNet-21k"
    assert cells(table, 3)["mean of 19"].number == "52.9"


def test_a_method_that_others_call_otherwise() -> None:
    table = one_table(suite("bias"), published())
    assert [(row.name, row.source) for row in table.rows] == [
        ("bias", "local"),
        ("bias", "VPT paper"),
        ("bias (bitfit)", "Unifying study"),
    ]


GROUP_MEANS = [  # natural, specialized, structured and their mean, as quoted from arXiv 2512.01405
    ("linear", "ViT-B/16 supervised ImageNet-21k", (None, None, None, 61.0)),
    ("head2toe", "ViT-B/16 supervised ImageNet-21k", (80.2, 84.7, 47.7, 70.9)),
    ("smp", "ViT-B/16 supervised ImageNet-21k", (80.7, 84.8, 55.4, 73.6)),
    ("combo", "ViT-B/16 supervised ImageNet-21k", (79.7, 84.5, 59.5, 74.6)),
    ("full", "ViT-B/16 supervised ImageNet-21k", (None, None, None, 74.2)),
    ("adapter_plus", "ViT-B/16 supervised ImageNet-21k", (None, None, None, 77.6)),
    ("combo", "DINOv2 ViT-B/14", (82.6, 85.9, 65.0, 77.9)),
    ("combo", "the best two backbones a task", (84.0, 86.3, 65.3, 78.6)),
]


def test_group_means_are_second_hand_and_fit_their_mean() -> None:
    rows = [row for row in published() if row.label == "ComBo paper"]
    names = ("natural", "specialized", "structured", "mean")
    assert [(row.name, row.backbone, tuple(row.groups.get(name) for name in names)) for row in rows] == GROUP_MEANS
    for row in rows:
        assert not row.verified
        assert row.status.startswith("second-hand")
        if len(row.groups) == 4:  # each is rounded to one decimal
            assert sum(row.groups[name] for name in names[:3]) / 3 == pytest.approx(row.groups["mean"], abs=0.101)


def test_group_means_stand_in_the_columns_of_means_alone() -> None:
    table = one_table(suite("combo"), published())
    papers = [(row.name, row.source, row.backbone) for row in table.rows[1:]]
    assert papers == [
        (name, "ComBo paper, unverified", backbone) for name, backbone, _ in GROUP_MEANS if name == "combo"
    ]
    found = cells(table, 1)
    numbers = ["79.7", "84.5", "59.5", "74.6"]  # which say nothing of the mean of 19
    assert {name: cell.number for name, cell in found.items() if cell.number != ABSENT} == dict(
        zip(list(MEANS)[:4], numbers, strict=True)
    )
    assert not any(cell.best or cell.marks or cell.spread for row in table.rows[1:] for cell in row.cells)
    assert table.rows[1].seeds == ABSENT
    assert [note.partition(":")[0] for note in table.notes] == [
        "unverified (ComBo paper)",
        "protocol differs (ComBo paper)",
    ]
    assert all(len(notes_of(table, row)) == 2 for row in table.rows[1:])
    assert table.common() == list(VTAB)


def test_group_means_do_not_decide_which_local_number_is_best() -> None:
    table = one_table(suite("combo") + local(*(result(task, 20.0, method="ladder") for task in VTAB)), published())
    best = {row.name: cells(table, at)["mean of 3 groups"].best for at, row in _rows(table) if row.local}
    assert best == {"combo": True, "ladder": False}
    assert not any(cell.best for row in table.rows if row.published for cell in row.cells)


@pytest.mark.parametrize(
    ("tasks", "shown"),
    [
        (("dtd",), []),  # no mean to compare
        ((*NATURAL[1:], *SPECIALIZED[1:]), []),
        (SPECIALIZED, ["combo", "combo", "combo"]),
        (VTAB, ["linear", "combo", "combo", "combo"]),  # linear's row has the mean of the groups alone
    ],
    ids=("a task", "parts of groups", "a group", "all"),
)
def test_group_means_appear_where_a_local_row_has_one_of_them(tasks: tuple[str, ...], shown: list[str]) -> None:
    rows = local(*(result(task, 50.0, method="linear") for task in tasks), result("dtd", 50.0, method="combo"))
    table = one_table(rows, published())
    assert [row.name for row in table.rows if row.published and row.published.groups] == shown


def test_group_means_are_of_vtab_alone() -> None:
    fgvc = local(*(result(task, 80.0, method="linear") for task in FGVC), result("digits", 90.0, method="combo"))
    rows = [row for table in compare(fgvc, published()) for row in table.rows]
    assert [row.source for row in rows] == ["local", "VPT paper", "local"]


def test_a_method_of_ones_own_has_the_group_means_of_its_name() -> None:
    table = one_table(suite("smp"), published())
    assert [(row.name, row.source) for row in table.rows] == [("smp", "local"), ("smp", "ComBo paper, unverified")]


def test_group_means_in_all_forms() -> None:
    results = suite("combo")
    tables = compare(results, published())
    console = Console(width=80, file=io.StringIO())
    show(tables, console)
    assert isinstance(console.file, io.StringIO)
    texts = forms(tables, results, []) | {"txt": console.file.getvalue()}
    for ending in ("txt", "md", "html"):
        text = " ".join(re.sub(r"&#39;", "'", texts[ending]).split())
        assert "unverified (ComBo paper): second-hand; group means alone" in text
        assert "DINOv2" in text
    status = "Status: unverified, second-hand; group means alone, no numbers of single tasks"
    assert texts["md"].count(status) == texts["html"].count(status) == 1
    (line,) = [line for line in texts["md"].splitlines() if "DINOv2 ViT-B/14" in line]
    dashes = [ABSENT] * 8
    assert line.split(" | ")[4:] == [
        *(*dashes[:7], "82.6", *dashes[:4], "85.9", *dashes[:8], "65.0", "77.9", f"{ABSENT} |"),
    ]
    assert texts["html"].count('<td class="number mean">77.9</td>') == 1
    lines = [line for line in csv.DictReader(io.StringIO(texts["csv"])) if line["status"] == "published"]
    assert [(line["task"], line["mean"], float(line["top1_mean"])) for line in lines[:4]] == [
        ("", "mean of 7 natural", 79.7),
        ("", "mean of 4 specialized", 84.5),
        ("", "mean of 8 structured", 59.5),
        ("", "mean of 3 groups", 74.6),
    ]
    assert len(lines) == 3 * 4
    assert all("second-hand" in line["notes"] for line in lines)
    assert {line["mean"] for line in csv.DictReader(io.StringIO(texts["csv"])) if line["task"]} == {""}


def test_only_the_group_means_of_vqt_are_called_verified() -> None:
    row = next(row for row in published() if row.method == "vqt")
    found = cells(one_table(suite(), [row]), 1)
    assert [found[name].number for name in list(MEANS)[:4]] == ["72.7", "84.5", "49.3", "68.8"]
    assert not row.verified
    (note,) = row.notes
    assert "the vqt row's group means alone (72.7, 84.5, 49.3) are verified" in note
    assert "SNELL" in note
    assert "ImageNet-21k" in note


def test_published_rows_of_fgvc_name_their_source() -> None:
    tables = compare(local(result("cub", 88.0, method="linear")), published())
    assert [row.source for row in tables[0].rows] == ["local", "VPT paper"]
    assert "arXiv 2203.12119" in sources(tables)[0]


# Reading


def test_results_are_found_below_folders_and_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a" / "deep" / "down", result("dtd", 50.0))
    with (write(tmp_path / "b", result("svhn", 60.0)) / "results.jsonl").open("a") as file:
        file.write("{")
    results, warnings = gather(["b", str(tmp_path / "a"), str(tmp_path)])
    assert [(each.result.task, each.folder) for each in results] == [
        ("svhn", "b"),
        ("dtd", str(tmp_path / "a" / "deep" / "down")),
    ]
    assert len(warnings) == 1  # no file is read twice


def test_of_a_run_in_two_folders_the_newest_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "a", result("dtd", 60.0, finished="2026-11-21T12:00:00+00:00"))
    write(tmp_path / "b", result("dtd", 50.0))
    for folders in (["a", "b"], ["b", "a"]):
        results, _ = gather([str(tmp_path / folder) for folder in folders])
        assert [each.result.test["top1"].mean for each in results] == [60.0]


def test_folders_without_results_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "full", result("dtd", 50.0))
    assert main(["report", *(str(tmp_path / name) for name in ("none", "full", "empty"))]) == 2
    shown = capsys.readouterr()
    assert f"{tmp_path}/none: there is no such folder" in shown.err
    assert f"{tmp_path}/empty: no results.jsonl in it or below it" in shown.err
    assert (shown.out, f"{tmp_path}/full" in shown.err) == ("", False)


def test_files_without_a_result_are_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"no results yet.*\n.*results.jsonl:1: Invalid JSON"):
        gather([str(tmp_path)])


def test_a_line_that_was_cut_off_is_a_warning_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "runs", result("dtd", 50.0), result("svhn", 60.0))
    file = folder / "results.jsonl"
    file.write_text(file.read_text()[:-100])
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert f"warning: {file}:2: Invalid JSON" in shown.err
    for ending in ("html", "md"):
        assert "results.jsonl:2: Invalid JSON" in (tmp_path / "out" / f"report.{ending}").read_text()
    lines = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    assert [line["task"] for line in lines if line["source"] == "local"] == ["dtd"]


def test_files_are_written_only_where_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "runs", result("dtd", 50.0, 51.0))
    assert main(["report", "runs"]) == 0
    assert "50.5 ± 0.7" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["results.jsonl"]
    assert main(["report", "runs", "--out", "a/b"]) == 0
    names = ["report.csv", "report.html", "report.md"]
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == names
    assert main(["report", "runs", "--out", str(folder / "results.jsonl")]) == 2
    assert "results.jsonl: cannot be written" in capsys.readouterr().err


def test_published_rows_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, result("dtd", 50.0))
    assert main(["report", str(tmp_path)]) == 0
    assert "66.7" in capsys.readouterr().out  # the VQT paper's
    assert main(["report", str(tmp_path), "--no-published", "--out", str(tmp_path / "out")]) == 0
    assert "66.7" not in capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert "VQT paper" not in path.read_text()


# Forms

HOSTILE = 'a|b_c & 5% $x$ <script>alert("1")</script> {z} \\ ~ ^ #'


def full_results() -> list[LocalResult]:
    """Three methods with costs and seeds, one cell of another protocol, one failure, hostile names."""
    cost = {"seconds": 100.0, "peak_memory_mib": 900.0, "device": "GPU", "versions": {"torch": "2.15"}}
    results = []
    for number, method in enumerate(("linear", "vqt", HOSTILE), start=1):
        for task in VTAB:
            parameters = Parameters(trained=1000 * number, total=10**6)
            values = [BY_HAND[task] + number, BY_HAND[task] + number + 1]
            more: dict[str, Any] = {"resize": "bicubic"} if (task, method) == ("dtd", "vqt") else {}
            if (task, method) == ("kitti", "linear"):
                values, more = [], {"failed": f"no {HOSTILE}"}
            facts = cost | {"parameters": parameters, "chosen": {"optim.lr": 0.01}, "folder": f"{task}/x"}
            results.append(result(task, *values, method=method, **facts, **more))
    return local(*results)


def test_terminal_shows_all_rows_however_narrow_it_is() -> None:
    tables = compare(suite("linear") + suite("vqt"), published())
    for width in (60, 200):
        console = Console(width=width, file=io.StringIO(), force_terminal=False)
        show(tables, console)
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        lines = [line.split() for line in shown.splitlines() if "mean of 19" in line]
        numbers = [word for line in lines for word in line if re.fullmatch(r"\d+\.\d", word)]
        assert numbers == ["37.9", "52.9", "52.7", "57.4", "37.9", "65.3"]  # and one row without this mean
        assert len(lines) == {60: 4, 200: 1}[width]
        assert all(len(line) <= width for line in shown.splitlines() if "│" in line)
        assert re.search(r"a +unverified \(VQT paper\)", shown)


def test_terminal_takes_no_markup_from_names() -> None:
    console = Console(width=100, file=io.StringIO())
    show(compare(local(result("dtd", method="[red]x[/red]", failed="[/nonsense]")), []), console)
    assert isinstance(console.file, io.StringIO)
    assert "[red]x[/red]" in console.file.getvalue()
    assert "failed: [/nonsense]" in console.file.getvalue()


def test_markdown_rows_have_as_many_cells_as_the_head() -> None:
    text = markdown(compare(full_results(), published()))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert widths == {4 + len(VTAB) + 5 + 1}
    assert len(rows) == 2 + 3 + 5
    assert r"a\|b_c &amp; 5% $x$ &lt;script>" in text
    assert "<script>" not in text
    assert "**73.0 ± 0.7**" not in text
    assert "| **73.5 ± 0.7** |" in text  # sun397: 70 + 3 and 70 + 4
    assert "- VQT paper: Tu et al. 2023, arXiv 2212.03220. Status: unverified, " in text


def test_several_labels_an_image_are_told_by_their_mean_average_precision() -> None:
    scores = {"mAP": spread((70.0, 72.0)), "f1_micro": spread((60.0, 61.0))}
    results = local(result("mine", test=scores, storage="table"), result("digits", 90.0, 92.0, storage="digits"))
    table = one_table(results)
    assert [column.label for column in table.columns] == ["mine (mAP)", "digits"]
    assert [cell.mean for cell in table.rows[0].cells] == [71.0, 91.0]
    lines = list(csv.DictReader(io.StringIO(csv_text([table]))))
    assert [(line["mAP_mean"], line["top1_mean"]) for line in lines] == [("71.0", ""), ("", "91.0")]
    assert lines[0]["mAP_values"] == "70.0 72.0"
    assert "top-1 or mAP" in figures(table, "mine")[0].svg


def test_csv_holds_everything_in_full() -> None:
    third = 100 / 3
    results = local(
        result(
            "dtd",
            third,
            50.0,
            seeds=(42, 44),
            chosen={"optim.lr": 0.01},
            val={"last": 61.5},
            seconds=1.23456789,
            parameters=Parameters(trained=12, total=34),
            notes=("one", "two"),
            folder="dtd/vqt",
            versions={"torch": "2.15"},
        ).model_copy(update={"epochs": {"last": 99}}),
        result("svhn", failed='says "no",\nand stops'),
    )
    lines = list(csv.DictReader(io.StringIO(csv_text(compare(results, published())))))
    assert [(line["task"], line["status"]) for line in lines[:2]] == [("dtd", "ok"), ("svhn", "failed")]
    assert [line["status"] for line in lines[2:]] == ["published"] * 19
    first, failed, paper = lines[0], lines[1], lines[4]
    assert float(first["top1_mean"]) == (third + 50.0) / 2
    assert [float(word) for word in first["top1_values"].split()] == [third, 50.0]
    assert float(first["top1_std"]) == pytest.approx((50 - third) / 2**0.5)
    assert (first["top1_n"], first["seeds"], first["chosen"]) == ("2", "42 44", '{"optim.lr": 0.01}')
    assert (first["val_last"], first["epoch_last"], first["epochs"], first["seconds"]) == (
        *("61.5", "99", "100", "1.23456789"),
    )
    assert (first["trained_parameters"], first["total_parameters"], first["images_test"]) == ("12", "34", "1880")
    assert (first["protocol_notes"], first["folder"], first["group"]) == ("one; two", "runs/dtd/vqt", "natural")
    assert (failed["failed"], failed["top1_mean"]) == ('says "no",\nand stops', "")
    assert (paper["task"], paper["top1_mean"], paper["source"]) == ("dtd", "66.7", "VQT paper, unverified")
    assert paper["group"] == "natural"
    assert "unverified (VQT paper)" in paper["notes"]


class Page(HTMLParser):
    """Tags that are open, and all that a browser would load or jump to."""

    EMPTY = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "srcset", "data")]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for _, value in attrs))
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(results: list[LocalResult], warnings: Sequence[str] = ()) -> tuple[Page, str]:
    text = html(compare(results, published()), results, warnings)
    return Page(text), text


def test_the_page_is_balanced_loads_nothing_and_runs_nothing() -> None:
    found, text = page(full_results() + local(result("cub", 1.0, 2.0), result("mine", 3.0, 4.0)))
    assert found.open == []
    assert text.startswith("<!DOCTYPE html>")
    assert found.tags["script"] == 0
    assert not re.search(r"@import|url\((?!#)", text)
    assert {link for link in found.links if not link.startswith("#")} == {"data:,"}
    assert [name for name, number in Counter(found.ids).items() if number > 1] == []
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert found.tags["table"] == 3 + 1  # and the details
    assert found.tags["svg"] == found.tags["figure"] == 5 + 2 + 2  # costs are of one row in the last two


def test_names_and_reasons_are_text_on_the_page() -> None:
    found, text = page(full_results(), [f"damaged: {HOSTILE}"])
    words = " ".join(" ".join(found.words).split())
    assert "<script>" not in text
    assert f"Warning: damaged: {HOSTILE}" in words
    assert f"kitti, linear: failed: no {HOSTILE}" in words
    assert words.count(HOSTILE) > 10


def test_the_page_shows_numbers_marks_machines_and_settings() -> None:
    found, text = page(full_results())
    words = " ".join(" ".join(found.words).split())
    for part in ("73.5", "± 0.7", "failed", "18/19", "GPU, torch 2.15 (57 results)", "optim.lr=0.01", "runs/dtd/x"):
        assert part in words.replace("\xa0", " ")
    assert "unverified (VQT paper): quoted from memory" in words
    assert "<b>73.5</b><small>±&nbsp;0.7</small>" in text
    mark = re.search(r'id="t1-(\w+)"><sup>\w+</sup> not as published: resize bicubic, not vpt', text)
    assert mark
    assert f'<a href="#t1-{mark[1]}">' in text


@pytest.mark.slow
def test_two_renders_are_byte_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "runs", *(each.result for each in full_results()))
    written = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        done = subprocess.run(
            [sys.executable, "-m", "dist_vpt", "report", "runs", "--out", str(out)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        written.append([done.stdout.replace(str(out), ""), *(file.read_bytes() for file in sorted(out.iterdir()))])
    assert len(written[0]) == 4
    assert written[0] == written[1]
    monkeypatch.chdir(tmp_path)
    results, warnings = gather(["runs"])
    again = forms(compare(results, published()), results, warnings)
    assert again["csv"].encode() == (tmp_path / "1" / "report.csv").read_bytes()


# Figures


def test_which_figures_there_are() -> None:
    titles = [picture.title for picture in figures(one_table(full_results(), published()), "x")]
    assert titles == [
        "Accuracy per task",
        "Accuracy against trained parameters",
        "Accuracy against training time",
        "Accuracy against peak memory",
        "Spread over seeds",
    ]
    assert [picture.title for picture in figures(one_table(suite()), "x")] == ["Accuracy per task"]
    assert figures(one_table(local(result("dtd", failed="x"))), "x") == []


def test_group_means_are_in_no_figure() -> None:
    facts = {"seconds": 10.0, "peak_memory_mib": 10.0, "parameters": Parameters(trained=1, total=2)}
    results = suite("combo", **facts) + suite("ladder", **facts)
    with_rows = figures(one_table(results, published()), "x")
    assert [picture.title for picture in with_rows] == [
        "Accuracy per task",
        "Accuracy against trained parameters",
        "Accuracy against training time",
        "Accuracy against peak memory",
    ]
    assert with_rows == figures(one_table(results), "x")


def test_costs_are_compared_over_the_tasks_that_all_own_rows_have() -> None:
    facts = {"seconds": 10.0, "peak_memory_mib": 10.0, "parameters": Parameters(trained=1, total=2)}
    linear = [result(task, 50.0, method="linear", **facts) for task in ("dtd", "svhn", "kitti")]
    table = one_table(local(*linear, result("dtd", 60.0, **facts), result("kitti", 60.0, **facts)))
    assert table.common() == ["dtd", "kitti"]
    texts = {picture.title: picture.text for picture in figures(table, "x")}
    assert "2 of 19 tasks that all local rows have (dtd, kitti)" in texts["Accuracy against peak memory"]
    local_rows = one_table(local(*linear, result("dtd", 60.0, method="vqt")))  # vqt's costs were not measured
    assert [picture.title for picture in figures(local_rows, "x")] == ["Accuracy per task"]


def test_figures_take_the_pages_colors_and_have_a_text() -> None:
    (picture,) = figures(one_table(suite()), "x")
    assert picture.svg.startswith('<svg role="img" aria-label="Accuracy per task. ')
    assert "currentColor" in picture.svg
    assert "#123456" not in picture.svg
    assert "<metadata>" not in picture.svg
    assert picture.text in picture.svg


def test_extra_tests_are_other_tasks() -> None:
    extra = {
        name: {"top1": spread(values)} for name, values in (("r", (20.0, 24.0)), ("c", (30.0,)), ("c/fog/1", (9.0,)))
    }
    found = compare(local(result("dtd", 50.0, extra_tests=extra), result("dtd", 51.0, method="lora")), [])
    vtab, other = found
    assert vtab.title == "VTAB-1k"
    assert [column.task for column in other.columns] == ["dtd: r", "dtd: c"]
    [row] = other.rows
    assert [(row.cells[0].mean, row.cells[0].spread), row.cells[1].mean] == [(22.0, "2.8"), 30.0]
    lines = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert {line["task"]: line["top1_mean"] for line in lines if line["table"] == "Other tasks"} == {
        "dtd: r": "22.0",
        "dtd: c": "30.0",
    }
