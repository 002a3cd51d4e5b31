"""``dist-vpt push``: a run's adapters, recipe, result, classes and model card, to the Hugging Face hub."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from dist_vpt.errors import UserError, WeightsError
from dist_vpt.files import new_folder, raising_disk_full, read_json, to_json, write_atomically
from dist_vpt.inference.hub import LOGIN, PEFT_FILES, RUN_FILES, HubId, adapters_file, explaining, is_hub_id, parse_id
from dist_vpt.inference.load import check_backbones, classes_of
from dist_vpt.inference.model_card import Shared, model_card
from dist_vpt.inference.peft_layout import peft_files
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.sharing import NOT_SHARED, WEIGHTS, shared_recipe
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.runs.folder import RunFolder

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
SENDABLE = (*RUN_FILES, *PEFT_FILES)


def push(  # noqa: PLR0917 (the options of the command)
    run: Any,
    to: str,
    private: bool = False,
    dry_run: bool = False,
    message: str = "",
    adapters: str = "last",
    revision: str | None = None,
    license: str | None = None,
    out: str | None = None,
) -> str:
    """Upload a run as one commit; returns the address of its page.

    ``run``: its folder, or what ``dist_vpt.train`` returned.
    ``to``: ``hub:user/name``, which is created if it does not exist. ``adapters``: last or best. ``revision``: a
    branch, made if it does not exist. ``license``: as the hub writes it; None: that of the backbone's weights.
    ``dry_run``: nothing is sent; the files are listed, or written to ``out``, a new folder that loads as the run on the
    hub would.

    Raises UserError before anything is sent: for a folder without a finished run, a name that is none, a missing token.
    """
    run, hub_id = str(getattr(run, "path", run)), _target(to, revision)
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(f"--license {license!r}: must be a license as the hub writes it, such as apache-2.0 or mit")
    if out is not None and not dry_run:
        raise UserError(f"--out {out}: only a dry run writes files here; add --dry-run")
    if not dry_run:
        _check_token(hub_id)
    files = shared_files(run, hub_id, adapters, license)
    if not dry_run:
        address = _upload(files, hub_id, private, message or f"Push {adapters} adapters with dist-vpt")
        print(address)
        return address
    if out is not None:
        _write(files, out)
    else:
        print(files["README.md"].decode())
    for name, content in files.items():
        print(f"{name}: {len(content):,} bytes")
    print(f"a dry run: nothing was sent to {hub_id}")
    return str(hub_id)


def shared_files(run: str, hub_id: HubId, adapters: str = "last", license: str | None = None) -> dict[str, bytes]:
    """The files of a run as they are on the hub: name -> content. No path of this machine is in them."""
    folder = _finished(run)
    path = adapters_file(folder, adapters)
    original = folder.load()
    tensors, facts = read_adapters(path)
    classes = classes_of(facts, path)
    check_backbones(original, facts, path)
    recipe = shared_recipe(original)
    _refuse_files_of_several(recipe, run)
    paths = _paths_of(original)
    facts = _without_paths(facts, paths) | {"recipe": recipe.model_dump(mode="json")}
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in facts.items()}
    result = _without_paths(_shared_result(read_json(folder.result), adapters), paths)
    files = {"adapters.safetensors": save(tensors, metadata), "recipe.yaml": recipe.to_yaml().encode()}
    files["result.json"] = (to_json(result, indent=1) + "\n").encode()
    files["classes.json"] = (json.dumps(classes, indent=1, ensure_ascii=False) + "\n").encode()
    peft = _peft_files(recipe, tensors, classes, path)
    files |= peft
    card = Shared(
        repo=hub_id.repo,
        recipe=recipe,
        result=result,
        classes=classes,
        adapters=adapters,
        adapter_bytes=len(files["adapters.safetensors"]),
        sweep=_sweep_of(folder),
        peft=bool(peft),
        license=license,
    )
    return files | {"README.md": model_card(card).encode()}


def _target(to: str, revision: str | None) -> HubId:
    hub_id = parse_id(to)
    if hub_id.revision and revision and hub_id.revision != revision:
        raise UserError(f"--revision {revision}: {to} names another one; give it once")
    return hub_id._replace(revision=revision or hub_id.revision)


def _finished(run: str) -> RunFolder:
    """Raises RunFolderError or UserError where there is no run, or none that has ended."""
    if is_hub_id(run):
        raise UserError(f"{run}: is on the hub already; name a run folder")
    folder = RunFolder(run)
    folder.refuse_sweep()
    folder.load()  # raises where there is no run
    status = folder.status().get("status", "done")  # a folder that was fetched has no run.json
    if status != "done" or not folder.result.is_file():
        reason = f"is {status}" if status != "done" else "has no result.json"
        raise UserError(f"{run}: {reason}: only a finished run is pushed; run.resume=auto continues it")
    return folder


def _peft_files(recipe: Recipe, tensors: Any, classes: Sequence[str], path: Path) -> dict[str, bytes]:
    """PEFT's files, none where it cannot express the run."""
    if recipe.method.name != "lora":
        return {}
    try:
        return peft_files(recipe, tensors, classes, path)
    except WeightsError:  # the adapters do not fit the recipe
        raise
    except UserError:
        return {}


def _refuse_files_of_several(recipe: Recipe, run: str) -> None:
    if recipe.backbones and any(WEIGHTS.fullmatch(member.weights) for member in recipe.backbones):
        raise UserError(
            f"{run}: one of its backbones has weights from a file, which whoever loads it could not give for one of "
            "several; push runs on several backbones that have weights=pretrained"
        )


def _shared_result(result: dict[str, Any], adapters: str) -> dict[str, Any]:
    """The result without paths, whose ``last`` is what the pushed adapters scored."""
    skipped = result.pop("skipped_images", [])
    if skipped:
        result["skipped"] = len(skipped)
    if "compression" in result:
        result["compression"]["source"] = NOT_SHARED  # may be relative to the folder that compress was started in
    if adapters == "best":
        result["last"] = result["best"]
    return result


def _paths_of(recipe: Recipe) -> list[str]:
    """The folders that a run names; longest first, since one may be inside another."""
    named = [recipe.data.root, recipe.run.dir, recipe.stream.dir, os.path.expanduser("~")]
    both = {path for name in named if name for path in (name, os.path.abspath(os.path.expanduser(name)))}
    return sorted((path for path in both if "/" in path.strip("/")), key=len, reverse=True)


def _without_paths(value: Any, paths: Sequence[str]) -> Any:
    """A copy in which no text is, or contains, a path."""
    if isinstance(value, dict):
        return {key: _without_paths(inner, paths) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner, paths) for inner in value]
    if not isinstance(value, str):
        return value
    for path in paths:
        value = value.replace(path, NOT_SHARED)
    return NOT_SHARED if Path(value).is_absolute() else value


def _sweep_of(folder: RunFolder) -> Mapping[str, Any] | None:
    """sweep.json of the sweep that a run is a seed of."""
    seeds = folder.path.resolve().parent
    file = seeds.parent / "sweep.json"
    return read_json(file) if seeds.name == "seeds" and file.is_file() else None


def _check_token(hub_id: HubId) -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{hub_id}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or use --dry-run")
    if not get_token():
        raise UserError(f"{hub_id}: there is no token of the hub; {LOGIN}; --dry-run needs none")


def _upload(files: Mapping[str, bytes], hub_id: HubId, private: bool, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo, revision = HfApi(library_name="dist-vpt"), hub_id.repo, hub_id.revision
    with explaining(hub_id, "cannot be pushed"):
        page = str(api.create_repo(repo, private=private or None, exist_ok=True))
        if private and not api.repo_info(repo).private:
            raise UserError(
                f"{hub_id}: --private: the repository exists and is public; make it private in its settings on {page}, "
                "or choose another name"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.list_repo_files(repo, revision=revision)
        changes: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        changes += [CommitOperationDelete(name) for name in SENDABLE if name in before and name not in files]
        api.create_commit(repo, changes, commit_message=message, revision=revision)
    return f"{page}/tree/{revision}" if revision else page


def _write(files: Mapping[str, bytes], out: str) -> None:
    folder = new_folder(out)
    with raising_disk_full("what would be uploaded", folder, "empty the folder and start again"):
        for name, content in files.items():
            write_atomically(folder / name, content)
    print(folder)
