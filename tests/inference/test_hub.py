"""Runs on a hub: pushed to a stand-in of it, fetched, used like run folders; nothing of the machine goes with them."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load, save
from sklearn.datasets import load_digits

from dist_vpt.backbones.build import DEMO
from dist_vpt.cli.main import main
from dist_vpt.data.config import DataConfig
from dist_vpt.errors import RecipeError, RunFailed, RunFolderError, UserError, WeightsError
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.hub import fetch, parse_id
from dist_vpt.inference.predict import predict
from dist_vpt.inference.push import push
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.sharing import NOT_SHARED, sha256_of, shared_recipe
from dist_vpt.runs.adapters import read_adapters
from tests.inference.hub_server import Hub
from tests.running import few_digits, train

FILES = {"adapters.safetensors", "recipe.yaml", "result.json", "classes.json", "README.md"}
ID = "hub:me/digits"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "secret-name"
    train(path, *few_digits(tmp_path_factory.mktemp("secret-data") / "root"), "data.image_size=16", "run.trackers=[]")
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photos") / "0.png"
    Image.fromarray(np.rint(255 - load_digits().images[0] * (255 / 16)).astype(np.uint8)).save(path)
    return str(path)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def pushed(hub: Hub, run: Path, repo: str = "me/digits") -> dict[str, bytes]:
    push(str(run), f"hub:{repo}")
    return hub.files(repo)


def change_recipe(hub: Hub, change: Callable[[dict[str, Any]], Any], repo: str = "me/digits") -> None:
    """Commit another recipe, as its author might by hand."""
    files = dict(hub.files(repo))
    content = yaml.safe_load(files["recipe.yaml"])
    change(content)
    hub.repos[repo].commit("main", files | {"recipe.yaml": yaml.safe_dump(content).encode()}, "by hand")


# Push, then use


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_a_pushed_run_is_used_like_a_folder(  # noqa: PLR0917 (fixtures)
    mode: str, hub: Hub, run: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.upload_mode = mode
    assert main(["push", str(run), ID]) == 0
    assert capsys.readouterr().out == f"{hub.endpoint}/me/digits\n"
    assert set(hub.files("me/digits")) == FILES | {".gitattributes"}
    assert bool(hub.objects) == (mode == "lfs")
    folder = fetch(ID)
    assert {path.name for path in folder.iterdir()} == FILES
    before, _ = read_adapters(run / "adapters.safetensors")
    after, _ = read_adapters(folder / "adapters.safetensors")
    assert all((before[name] == after[name]).all() for name in before | after)
    assert predict(ID, [photo], top=10) == predict(str(run), [photo], top=10)


@pytest.mark.slow
def test_fetching_in_a_fresh_process(hub: Hub, run: Path, photo: str, tmp_path: Path) -> None:
    pushed(hub, run)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "dist_vpt", "predict"]

    def predicted(source: str, **more: str) -> str:
        options = {"env": environment | more, "capture_output": True, "text": True, "timeout": 120}
        done = subprocess.run([*command, source, photo], check=False, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        return done.stdout

    here = predicted(str(run))
    assert predicted(ID) == here
    asked = len(hub.requests)
    assert predicted(ID, HF_HUB_OFFLINE="1") == here
    assert len(hub.requests) == asked


def test_scores_of_a_fetched_run(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pushed(hub, run)
    with pytest.raises(UserError, match=r"the folder of its dataset is not shared with it; give data\.root=FOLDER"):
        evaluate_run(ID, "test", "last")
    root = load_recipe([run / "recipe.yaml"]).data.root
    reported = json.loads((run / "result.json").read_text())["last"]["test"]
    assert evaluate_run(ID, "test", "last", [f"data.root={root}"]) == reported
    assert f"{reported['top1']:.4f}" in capsys.readouterr().out


def test_attention_of_a_fetched_run_is_drawn_here(
    hub: Hub, run: Path, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(hub, run)
    monkeypatch.chdir(tmp_path)
    assert main(["attention", ID, photo, "--block", "0"]) == 0
    assert list((tmp_path / "attention").glob("0-*.png"))
    assert {path.name for path in fetch(ID).iterdir()} == FILES


def test_the_best_adapters(hub: Hub, run: Path) -> None:
    copy = Path(shutil.copytree(run, run.parent / "best"))
    result = json.loads((copy / "result.json").read_text())
    result["best"] = {"epoch": 7, "val": {"top1": 12.5}}
    (copy / "result.json").write_text(json.dumps(result))
    push(str(copy), ID, adapters="best")
    files = hub.files("me/digits")
    best, _ = read_adapters(copy / "best.safetensors")
    assert all((load(files["adapters.safetensors"])[name] == best[name]).all() for name in best)
    assert json.loads(files["result.json"])["last"]["epoch"] == 7
    assert "| top-1 accuracy, % | 12.50 |" in files["README.md"].decode()
    assert "after the best epoch on val (7 of 1)" in files["README.md"].decode()


def test_a_fetched_run_has_one_file_of_adapters(hub: Hub, run: Path, photo: str) -> None:
    pushed(hub, run)
    with pytest.raises(UserError, match=r"--adapters best: .* was shared with one file of adapters; leave it out"):
        predict(ID, [photo], adapters="best")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"classes": "a,b"}, "damaged adapters"),  # no JSON
        ({"classes": "3"}, "lists no classes"),
        ({"classes": '["a", 3]'}, "lists no classes"),
        ({}, "lists no classes"),
        ({"classes": '["a", "b"]', "recipe": "[]"}, "head.weight has shape"),
    ],
)
def test_facts_of_adapters_that_others_wrote(
    facts: dict[str, str], message: str, hub: Hub, run: Path, photo: str
) -> None:
    files = pushed(hub, run)
    other = save(load(files["adapters.safetensors"]), facts)
    hub.repos["me/digits"].commit("main", {**files, "adapters.safetensors": other}, "by hand")
    with pytest.raises(WeightsError, match=message):
        predict(ID, [photo])


# What is shared


def test_nothing_of_the_machine_is_shared(hub: Hub, run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    copy = Path(shutil.copytree(run, run.parent / "skipping"))
    root = load_recipe([run / "recipe.yaml"]).data.root
    reported: dict[str, Any] = {"skipped_images": ["/secret-data/a.png"]}
    reported["warnings"] = [f"{root}/a.png: odd", "/secret-name"]
    reported["compression"] = {"source": "../secret-runs/adapters.safetensors", "keep": 0.5}
    (copy / "result.json").write_text(json.dumps(result | reported))
    for name, content in pushed(hub, copy).items():
        assert b"secret" not in content, name
        assert os.path.expanduser("~").encode() not in content or name == "README.md"
    recipe = yaml.safe_load(hub.files("me/digits")["recipe.yaml"])
    assert recipe["data"]["root"] == NOT_SHARED
    assert recipe["run"]["dir"] is None
    shared = json.loads(hub.files("me/digits")["result.json"])
    assert shared["skipped"] == 1
    assert shared["warnings"] == [f"{NOT_SHARED}/a.png: odd", NOT_SHARED]
    assert shared["compression"] == {"source": NOT_SHARED, "keep": 0.5}


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["data.task=a", "data.format=image_folder", "data.root=pictures"], "data.root", NOT_SHARED),
        (["data.task=a", "data.format=hf", "data.root=ylecun/mnist"], "data.root", "ylecun/mnist"),
        (["data.task=a", "data.format=hf", "data.root=/data/mnist"], "data.root", NOT_SHARED),
        (["data.task=a", "data.format=hf", "data.root=~/mnist"], "data.root", NOT_SHARED),
        (["stream.cache=disk", "stream.dir=/scratch", "method.name=linear"], "stream.dir", None),
        (["backbone.weights=/home/me/w.npz"], "backbone.weights", f"{NOT_SHARED}:w.npz"),
        (
            ["data.task=a", "data.format=hf", "data.root=a/b", "data.hf.splits={train: ../t}"],
            "data.hf.splits.train",
            NOT_SHARED,
        ),
        (
            ["data.task=a", "data.format=hf", "data.root=a/b", "data.hf.splits={train: s/t}"],
            "data.hf.splits.train",
            "s/t",
        ),
        (["sweep.grid.data.root=[pictures]"], "sweep.grid.data.root", [NOT_SHARED]),
        (["sweep.grid.backbone.weights=[a/b.npz,random]"], "sweep.grid.backbone.weights", [NOT_SHARED, "random"]),
        (["run.dir=/home/me/x"], "run.dir", None),
    ],
)
def test_paths_in_a_recipe(overrides: list[str], key: str, value: object) -> None:
    shared = shared_recipe(load_recipe([], overrides))
    found: Any = shared.model_dump(mode="json")
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert shared_recipe(shared) == shared


def test_a_backbone_from_a_file(
    hub: Hub, run: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its place is not shared, and it has to be given."""
    weights, copy = tmp_path / "secret" / "vit.safetensors", Path(shutil.copytree(run, run.parent / "from_file"))
    weights.parent.mkdir()
    shutil.copy(DEMO, weights)
    (copy / "recipe.yaml").write_text(load_recipe([run / "recipe.yaml"], [f"backbone.weights={weights}"]).to_yaml())
    files = pushed(hub, copy)
    needed = f"{NOT_SHARED}:vit.safetensors@sha256:{sha256_of(DEMO)}"
    assert yaml.safe_load(files["recipe.yaml"])["backbone"]["weights"] == needed
    assert f"SHA-256 `{sha256_of(DEMO)}`" in files["README.md"].decode()
    assert main(["predict", ID, photo]) == 2
    message = capsys.readouterr().err
    assert "had weights from the file vit.safetensors (sha256" in message
    assert "give it with --weights FILE" in message
    assert predict(ID, [photo], weights=str(weights)) == predict(str(run), [photo])
    other = tmp_path / "other.safetensors"
    other.write_bytes(save({"a": load(files["adapters.safetensors"])["head.bias"]}))
    with pytest.raises(WeightsError, match=r"another file than vit.safetensors, on which hub:me/digits was trained"):
        predict(ID, [photo], weights=str(other))


@pytest.mark.skipif("extra_tests" not in DataConfig.model_fields, reason="there are none")
def test_extra_test_sets_are_not_shared(hub: Hub, run: Path, photo: str) -> None:
    assert shared_recipe(load_recipe([], ["data.extra_tests={r: sketches}"])) == shared_recipe(load_recipe([]))
    pushed(hub, run)
    change_recipe(hub, lambda content: content["data"].update(extra_tests={"r": "sketches"}))
    with pytest.raises(RecipeError, match=r"data\.extra_tests\.r = 'sketches': names a file or folder"):
        predict(ID, [photo])


# Pushing again, branches, privacy


def test_pushing_again_replaces_what_is_there(hub: Hub, run: Path) -> None:
    hub.create("me/digits", {"adapter_config.json": b"{}", "photo.jpg": b"kept"})
    assert set(pushed(hub, run)) == FILES | {"photo.jpg"}
    assert [len(files) for files in hub.repos["me/digits"].commits.values()] == [2, 6]  # one commit


def test_a_branch(hub: Hub, run: Path, photo: str) -> None:
    assert push(str(run), ID, revision="v1", message="The first") == f"{hub.endpoint}/me/digits/tree/v1"
    assert hub.repos["me/digits"].messages[-1] == "The first"
    assert set(hub.files("me/digits")) == {".gitattributes"}
    with pytest.raises(WeightsError, match=r"hub:me/digits: holds no run"):
        fetch(ID)
    assert fetch(ID, "v1") == fetch(f"{ID}@v1")
    assert predict(f"{ID}@v1", [photo]) == predict(str(run), [photo])
    with pytest.raises(UserError, match="hub:me/digits@v2: cannot be downloaded: there is no revision v2"):
        fetch(ID, "v2")
    with pytest.raises(UserError, match="--revision v2: hub:me/digits@v1 names another one"):
        push(str(run), f"{ID}@v1", revision="v2")


def test_private(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(str(run), ID, private=True)
    assert hub.repos["me/digits"].private
    fetch(ID)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError, match="there is no such repository, or it is private"):
        fetch("hub:me/private")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    hub.create("me/public", {})
    with pytest.raises(UserError, match="--private: the repository exists and is public"):
        push(str(run), "hub:me/public", private=True)
    assert hub.files("me/public") == {}


# Dry runs, and what is refused before anything is sent


def test_a_dry_run_sends_nothing(  # noqa: PLR0917 (fixtures)
    hub: Hub, run: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(run), ID, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "library_name: dist-vpt" in printed
    assert printed.endswith("a dry run: nothing was sent to hub:me/digits\n")
    out = tmp_path / "out"
    assert main(["push", str(run), ID, "--dry-run", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    capsys.readouterr()
    assert predict(str(out), [photo]) == predict(str(run), [photo])
    assert main(["push", str(run), ID, "--dry-run", "--out", str(out)]) == 2
    held = "holds files (README.md, adapters.safetensors, classes.json); name a new or an empty folder"
    assert held in capsys.readouterr().err
    assert hub.requests == []


def test_a_full_disk(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match=r"No space left on device.*free space there, then empty the folder"):
        push(str(run), ID, dry_run=True, out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("me/digits", "not the name of a repository on the hub; write hub:USER/NAME"),
        ("hub:digits", "not the name of a repository on the hub; write hub:USER/NAME"),
        ("hub:me/", "not the name of a repository on the hub"),
        ("hub:me/a/b", "not the name of a repository on the hub"),
        ("hub:me/../x", "not the name of a repository on the hub"),
        ("hub:me/a b", "not the name of a repository on the hub"),
        ("hub:me/a--b", "not the name of a repository on the hub"),
        ("hub:me/a@", "not the name of a repository on the hub"),
    ],
)
def test_names_that_are_none(
    target: str, message: str, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        parse_id(target)
    assert main(["push", str(run), target]) == 2
    assert message in capsys.readouterr().err
    assert hub.requests == []


def test_what_is_no_finished_run(hub: Hub, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match="not a run folder"):
        push(str(tmp_path / "empty"), ID)
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    info = json.loads((run / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(info | {"status": "interrupted"}))
    with pytest.raises(UserError, match=r"is interrupted: only a finished run is pushed; run.resume=auto continues it"):
        push(str(unfinished), ID)
    (unfinished / "run.json").write_text(json.dumps(info | {"kind": "sweep"}))
    with pytest.raises(RunFolderError, match="is a sweep; name one of its runs, such as"):
        push(str(unfinished), ID)
    (unfinished / "run.json").write_text(json.dumps(info))
    (unfinished / "result.json").unlink()
    with pytest.raises(UserError, match=r"has no result\.json: only a finished run"):
        push(str(unfinished), ID)
    with pytest.raises(UserError, match="is on the hub already; name a run folder"):
        push(ID, ID)
    with pytest.raises(UserError, match="--out x: only a dry run writes files here"):
        push(str(run), ID, out="x")
    with pytest.raises(UserError, match="--license 'All rights': must be a license as the hub writes it"):
        push(str(run), ID, license="All rights")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "there is no token of the hub; run `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", "cannot be pushed: the hub does not accept the token; run `hf auth login`"),
        (
            "hf_reader",
            "cannot be pushed: the token has no permission; use one that may write to me: run `hf auth login`",
        ),
        ("hf_other", "cannot be pushed: the token has no permission; use one that may write to me"),
    ],
)
def test_tokens(token: str, message: str, hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        push(str(run), ID)
    assert hub.repos == {}


def test_without_a_network(hub: Hub, run: Path, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    pushed(hub, run)
    expected = predict(ID, [photo])
    offline(monkeypatch)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or use --dry-run"):
        push(str(run), ID)
    asked = len(hub.requests)
    assert predict(ID, [photo]) == expected
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and the cache has no whole copy; unset it and load"):
        fetch("hub:me/other")
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # where nobody listens
    assert predict(ID, [photo]) == expected
    with pytest.raises(UserError, match=r"http://127.0.0.1:1 cannot be reached \(.*and the cache has no whole copy"):
        fetch("hub:me/other")
    with pytest.raises(UserError, match=r"cannot be pushed: .*check the connection to http://127.0.0.1:1"):
        push(str(run), ID)


def test_a_hub_that_fails(hub: Hub, run: Path) -> None:
    hub.fails_with = 503
    with pytest.raises(UserError, match="hub:me/digits: cannot be pushed: the hub answers with status 503"):
        push(str(run), ID)
    with pytest.raises(UserError, match=r"hub:me/digits: cannot be downloaded: .*503"):
        fetch(ID)


def test_a_repository_with_an_owner_who_grants_access(hub: Hub) -> None:
    hub.create("other/gated", {"recipe.yaml": b""}, gated=True)
    with pytest.raises(UserError, match="its owner grants access on request; ask for it on http"):
        fetch("hub:other/gated")


# What others have written


class Attack:
    """A pickle that leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_by_name_and_not_downloaded(hub: Hub, run: Path, tmp_path: Path) -> None:
    attack = pickle.dumps(Attack(tmp_path / "harm"))
    hub.create("me/pickle", {"pytorch_model.bin": attack, "config.json": b"{}"})
    with pytest.raises(WeightsError, match=r"holds pytorch_model.bin, and no run; a file of this kind may run code"):
        fetch("hub:me/pickle")
    files = pushed(hub, run)
    hub.repos["me/digits"].commit("main", {**files, "model.pt": attack, "setup.py": b"raise SystemExit"}, "more")
    assert {path.name for path in fetch(ID).iterdir()} == FILES
    assert not (tmp_path / "harm").exists()
    resolved = [request for request in hub.requests if "/resolve/" in request]
    assert not [request for request in resolved if request.endswith((".bin", ".pt", ".py", "config.json"))]
    hub.create("me/disguised", {**files, "adapters.safetensors": attack})
    with pytest.raises(WeightsError, match="damaged adapters"):
        predict("hub:me/disguised", ["x.png"])
    assert not (tmp_path / "harm").exists()


def test_repositories_that_hold_no_run(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.create("me/empty", {})
    with pytest.raises(WeightsError, match=r"holds no run .adapters.safetensors and recipe.yaml missing.; name a repo"):
        fetch("hub:me/empty")
    hub.create("me/peft", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    with pytest.raises(WeightsError, match="an adapter of PEFT, and no run; make a run of it with `dist-vpt import-pe"):
        fetch("hub:me/peft")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["backbone"].update(weights="/etc/passwd"), r"backbone\.weights = '/etc/passwd': names a file or"),
        (lambda c: c["backbone"].update(weights="model.pth"), r"backbone\.weights = 'model\.pth': names a file or"),
        (lambda c: c["backbone"].update(weights="not-shared:../w.pth"), r"weights = 'not-shared:\.\./w\.pth': names"),
        (lambda c: c["data"].update(root="/home"), r"data\.root = '/home': names a file or folder"),
        (lambda c: c["data"].update(format="hf", root="../me"), r"data\.root = '\.\./me': names a file"),
        (lambda c: c["run"].update(dir="/tmp/x"), r"run\.dir = '/tmp/x': names a file or folder"),
        (
            lambda c: c.update(method={"name": "linear"}, stream={"dir": "cache"}),
            r"stream\.dir = 'cache': names a file or folder",
        ),
        (lambda c: c["sweep"].update(grid={"data": {"root": ["/a"]}}), r"sweep\.grid\.data\.root\.0 = '/a': names"),
        (lambda c: c.update(base="/etc/hosts"), r"recipe\.yaml: base: there is no such key"),
        (lambda c: c["optim"].update(lr="much"), r"hub:me/digits: recipe\.yaml: .*optim\.lr"),
    ],
)
def test_a_recipe_from_elsewhere_reads_no_file_of_this_machine(
    change: Callable[[dict[str, Any]], Any], message: str, hub: Hub, run: Path, photo: str
) -> None:
    pushed(hub, run)
    change_recipe(hub, change)
    with pytest.raises(RecipeError, match=message):
        predict(ID, [photo])


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "[", "a: &a [*a]", "3"])
def test_recipes_that_are_none(text: str, hub: Hub, run: Path) -> None:
    files = pushed(hub, run)
    hub.repos["me/digits"].commit("main", {**files, "recipe.yaml": text.encode()}, "by hand")
    with pytest.raises(RecipeError, match=r"^hub:me/digits: recipe\.yaml"):
        fetch(ID)
