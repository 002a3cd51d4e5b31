"""results.jsonl: what is appended is read back, whatever else is in the file."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dist_vpt.errors import UserError
from dist_vpt.runs.results import Parameters, Protocol, Result, append, read, spread

PROTOCOL: dict[str, Any] = {
    "storage": "tfds dtd:3.0.1 (array_record)",
    "resize": "vpt",
    "fit": "squash",
    "normalize": "vpt",
    "image_size": 224,
    "counts": {"train": 800, "val": 200, "trainval": 1000, "test": 1880},
    "trials": 20,
    "epochs": 100,
}


def result(run: str = "a1", **changes: Any) -> Result:
    facts = {
        "run": run,
        "task": "dtd",
        "group": "natural",
        "method": "vqt",
        "backbone": "demo",
        "precision": "bf16",
        "protocol": PROTOCOL,
    }
    return Result.model_validate(facts | changes)


def test_everything_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    full = result(
        seeds=(42, 44),
        chosen={"optim.lr": 1e-3, "method.queries": 1, "method.blocks": [0, 1]},
        val={"last": 61.5, "best": 62.0},
        epochs={"last": 100, "best": 71},
        test={"top1": spread([60.1, 62.3]), "loss": spread([1.25, 1.5])},
        seconds=12.5,
        peak_memory_mib=900.25,
        parameters=Parameters(trained=1000, total=5000),
        device="NVIDIA H200",
        versions={"torch": "2.15.0"},
        finished="2026-11-20T12:00:00+00:00",
        folder="dtd/vqt",
    )
    failed = result("b2", task="kitti", protocol=None, failed="no image in train")
    append(file, full)
    append(file, failed)
    assert read(file) == ([full, failed], [])
    assert len(file.read_text().splitlines()) == 2


def test_a_later_line_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    first, other, again = result(failed="out of memory"), result(task="svhn"), result(seconds=3.0)
    another_recipe = result("b2")
    for line in (first, other, another_recipe, again):
        append(file, line)
    assert read(file) == ([other, another_recipe, again], [])


def test_a_line_that_was_cut_off_is_told_and_loses_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    append(file, result("a1"))
    append(file, result("b2"))
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"\n") + 40])
    append(file, result("c3"))
    found, wrong = read(file)
    assert [each.run for each in found] == ["a1", "c3"]
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{file}:2: Invalid JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "task: Input should be a valid string"),
        ({"seconds": -1}, "seconds: Input should be greater than or equal to 0"),
        ({"protocol": {**PROTOCOL, "epochs": "many"}}, "protocol.epochs: Input should be a valid integer"),
        ({"protocol": None}, "Value error, protocol is missing: only a failed result may lack it"),
        ({"test": {"top1": {"mean": 1.0, "std": 0.0}}}, "test.top1.values: Field required"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_line_that_breaks_a_rule_is_reported_with_its_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "results.jsonl"
    line = result("bad").model_dump(mode="json") | change
    file.write_text(json.dumps(line) + "\n\n" + result("good").model_dump_json() + "\n")
    found, wrong = read(file)
    assert [each.run for each in found] == ["good"]
    assert [line.startswith(f"{file}:1: {message}") for line in wrong] == [True]


def test_keys_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(result().model_dump(mode="json") | {"color": "red"}) + "\n")
    assert read(file) == ([result()], [])


def test_bytes_that_are_no_text_are_one_damaged_line(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_bytes(b"\xff\xfe\x00\n" + result().model_dump_json().encode() + b"\n")
    found, wrong = read(file)
    assert (found, len(wrong)) == ([result()], 1)


def test_numbers_that_are_not_finite_are_no_result() -> None:
    with pytest.raises(ValidationError):
        spread([60.0, float("nan")])
    with pytest.raises(ValidationError):
        result(val={"last": float("inf")})


def test_many_writers_lose_no_line(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    runs = [f"run{number}" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: append(file, result(run, device="x" * 5000)), runs))
    found, wrong = read(file)
    assert (sorted(each.run for each in found), wrong) == (sorted(runs), [])


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.jsonl"
    append(file, result("a1"))
    before, write = file.read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
        with pytest.raises(
            UserError, match=r"results.jsonl: cannot be written \(No space left on device.*run the same command again"
        ):
            append(file, result("b2"))
    assert file.read_bytes() == before
    append(file, result("b2"))
    assert [each.run for each in read(file)[0]] == ["a1", "b2"]


def test_a_file_that_cannot_be_written_or_read_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/results.jsonl: cannot be written \(No such file or directory\)"):
        append(tmp_path / "none" / "results.jsonl", result())
    with pytest.raises(UserError, match=r"results.jsonl: cannot be read \(No such file or directory\); name a folder"):
        read(tmp_path / "results.jsonl")


def test_mean_and_standard_deviation_by_hand() -> None:
    three = spread([1.0, 2.0, 6.0])  # squares about 3: 4 + 1 + 9 = 14, over 2
    assert (three.mean, three.std, three.values) == (3.0, pytest.approx(7**0.5), (1.0, 2.0, 6.0))
    assert (spread([5.5]).mean, spread([5.5]).std) == (5.5, 0.0)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({}, []),
        ({"resize": "bicubic"}, ["resize"]),
        ({"fit": "crop", "trials": 4, "epochs": 30}, ["fit", "trials", "epochs"]),
        ({"normalize": "weights", "image_size": 98}, ["normalize", "image_size"]),
        ({"notes": ("another version",)}, ["notes"]),
        ({"storage": "tfds svhn_cropped:3.0.0 (tfrecord)"}, []),  # another task's, another version
        ({"storage": "vtab_folder"}, ["storage"]),
        ({"storage": ""}, ["storage"]),
        ({"counts": {"train": 700, "val": 200, "trainval": 900, "test": None}}, []),
    ],
    ids=str,
)
def test_fields_in_which_protocols_differ(change: dict[str, Any], fields: list[str]) -> None:
    one, other = Protocol(**PROTOCOL), Protocol(**(PROTOCOL | change))
    assert one.differs(other) == fields
    assert other.differs(one) == fields


def test_results_of_two_storages_stay_apart_and_a_failure_gives_way(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    failed = result(protocol=None, failed="no disk")
    folder = result(protocol={**PROTOCOL, "storage": "vtab_folder"})
    for each in (failed, result(), folder):
        append(file, each)
    found, wrong = read(file)
    assert not wrong
    assert [each.protocol.storage.split()[0] for each in found if each.protocol] == ["tfds", "vtab_folder"]
    assert len(found) == 2


def test_what_a_protocol_does_not_know_is_refused() -> None:
    with pytest.raises(ValidationError, match="surprise"):
        result(protocol={**PROTOCOL, "surprise": 1})
