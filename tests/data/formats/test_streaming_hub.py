"""Data sets on the Hugging Face hub, streamed from a stand-in of it: by name, pinned to a commit, with a login."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.formats.test_streaming import files, noise
from tests.inference.hub_server import Hub, serving

pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import numpy as np
from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.errors import UserError
for keys in json.loads(sys.argv[1]):
    try:
        splits = open_splits(DataConfig(task="mine", **keys))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
        continue
    train = splits.train
    print(json.dumps({"classes": splits.classes, "images": len(train), "where": train.where(57),
                      "sum": int(np.asarray(train.read(57)).sum())}))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        long = {"train-0": "train-00000-of-00002", "train-1": "train-00001-of-00002"}
        tables = {
            f"data/{long.get(name.split('.')[0]) or name.split('.')[0] + '-00000-of-00001'}.parquet": content
            for name, content in files("hf").items()
        }
        for repo, held in (("me/tables", tables), ("other/private", tables), ("me/shards", files("webdataset"))):
            made = found.create(repo, held, private=repo == "other/private")
            made.lfs |= set(held)
        yield found


def opened(hub: Hub, cache: Path, *keys: dict[str, Any], token: str = "") -> list[dict[str, Any]]:
    """What a process of its own, for which the hub is the hub, finds for each of the keys."""
    environ = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "XDG_CACHE_HOME": str(cache),
        "HF_HOME": str(cache / "hf"),
    }
    if token:
        environ["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(keys)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_by_its_name(hub: Hub, tmp_path: Path) -> None:
    keys = {"format": "hf", "root": "me/tables", "streaming": True}
    (found,) = opened(hub, tmp_path, keys)
    commit = hub.repos["me/tables"].branches["main"]
    assert (found["classes"], found["images"]) == (["cat", "dog"], 96)
    assert found["where"] == f"hf://datasets/me/tables@{commit}/data/train-00001-of-00002.parquet record 1"
    assert found["sum"] == int(np.asarray(noise(57)).sum())
    held = hub.repos["me/tables"].commits[commit]
    name = "data/train-00000-of-00002.parquet"
    assert sum(end - first for file, first, end in hub.ranges if file == name) < len(held[name]) / 3
    hub.ranges.clear()
    assert opened(hub, tmp_path, keys) == [found]
    assert hub.ranges == []


def test_shards_and_files_below_an_address(hub: Hub, tmp_path: Path) -> None:
    tables = {"train": "train-*.parquet", "val": "val-*.parquet", "test": "test-*.parquet"}
    root, train = "hf://datasets/me/shards", {"splits": {"train": "train-{0..1}.tar"}}
    shards, named, folder, wrong = opened(
        hub, tmp_path,
        {"format": "webdataset", "root": root},
        {"format": "webdataset", "root": f"{root}@main", "webdataset": train},
        {"format": "hf", "root": "hf://datasets/me/tables/data", "streaming": True, "hf": {"splits": tables}},
        {"format": "hf", "root": "me/shards", "streaming": True},
    )  # fmt: skip
    commit = hub.repos["me/shards"].branches["main"]
    assert shards["where"] == f"hf://datasets/me/shards@{commit}/train-1.tar sample 0057"
    assert shards["images"] == 96
    assert shards["sum"] == folder["sum"] == int(np.asarray(noise(57)).sum())
    assert f"@{commit}/" in named["where"]
    assert "Parquet files alone are streamed" in wrong["error"]


def test_private_data_sets_need_a_login(hub: Hub, tmp_path: Path) -> None:
    hidden = {"format": "hf", "root": "other/private", "streaming": True}
    address = {"format": "webdataset", "root": "hf://datasets/other/none"}
    first, second = opened(hub, tmp_path / "a", hidden, address)
    assert "other/private': is not a folder, and as a dataset of the hub it cannot be opened" in first["error"]
    assert second["error"].startswith("hf://datasets/other/none")
    assert "may not be read" in second["error"] or "does not exist" in second["error"], second["error"]
    assert "\n" not in second["error"]
    (found,) = opened(hub, tmp_path / "b", hidden, token="hf_other")
    assert found["images"] == 96
