"""result.json has the same keys whoever writes it, and only what is known."""

from pathlib import Path
from typing import Any

from dist_vpt.files import read_json
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.result import run_result, write_result

ALWAYS = (
    *("last", "best", "seconds", "images_per_s", "peak_memory_mib", "parameters", "skipped_images", "device"),
    *("processes", "precision", "seed", "versions"),
)


def result(**more: Any) -> dict[str, Any]:
    return run_result(
        load_recipe([], ["seed=7"]),
        last={"epoch": 2},
        best={},
        seconds=1.23456,
        images_per_s=10.987,
        parameters={"trained": 1, "total": 2},
        skipped={"b", "a"},
        device="a device",
        processes=1,
        **more,
    )


def test_keys_in_their_order() -> None:
    assert tuple(result()) == ALWAYS
    optional = {"compression": {}, "frozen_weights_mib": {}, "strategy": "ddp", "runtime": {}, "protocol": {}}
    assert set(result(**optional)) == {*ALWAYS, *optional}


def test_values() -> None:
    found = result()
    assert (found["seed"], found["best"], found["skipped_images"]) == (7, None, ["a", "b"])
    assert (found["seconds"], found["images_per_s"]) == (1.235, 10.99)


def test_what_is_written_is_what_was_made(tmp_path: Path) -> None:
    write_result(RunFolder(tmp_path), result())
    assert read_json(tmp_path / "result.json") == result() | {
        "peak_memory_mib": read_json(tmp_path / "result.json")["peak_memory_mib"]
    }
