"""Recipes that leave their machine: they name no file and no folder of it.

In a shared recipe

- ``run`` and ``stream`` have their default values;
- ``data.root`` is ``not-shared``, unless it is the id of a dataset on the Hugging Face hub;
- the ``weights`` of a backbone that come from a file are ``not-shared:NAME@sha256:HASH``: the file's name without its
  folder, and the hash of its content. Who loads the run gives the file;
- there are no extra test sets, and any other text that is an absolute path, or leaves its folder, is ``not-shared``.
  Relative paths inside a dataset stay: they are of use with the ``data.root`` of whoever loads the run.

The recipe of another machine is held to the same rules before anything is done with it: it can make this machine read
no file that its user has not named.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dist_vpt.backbones.config import require_file
from dist_vpt.data.config import DataConfig
from dist_vpt.errors import RecipeError, UserError, WeightsError
from dist_vpt.frozen_stream.config import StreamConfig
from dist_vpt.recipe.loading import load_recipe_from
from dist_vpt.recipe.reading import read_content
from dist_vpt.recipe.schema import Recipe, RunConfig

NOT_SHARED = "not-shared"
WEIGHTS = re.compile(rf"{NOT_SHARED}:(?P<name>[^/\\@]+)(@sha256:(?P<sha256>[0-9a-f]{{64}}))?")
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # of the hub
FOLDERS = (("run", "dir"), ("stream", "dir"), ("data", "extra_tests"))  # keys whose values are always folders
PLACES = {"weights", "root", "dir"}  # names of keys of files and folders, for grids of a sweep
HASHED_BYTES = 2**20  # that are read at a time
KeyPath = tuple[str | int, ...]


class WeightsFile(NamedTuple):
    """The weights' file of a shared recipe, which its author had and nobody else has yet."""

    name: str
    sha256: str | None  # None: it was gone when the run was shared


def shared_recipe(recipe: Recipe) -> Recipe:
    """The recipe without the paths of this machine. Reads the weights' file, for its hash."""
    content = recipe.model_dump(mode="json")
    content |= {"run": RunConfig().model_dump(mode="json"), "stream": StreamConfig().model_dump(mode="json")}
    if content["data"].get("extra_tests"):
        content["data"]["extra_tests"] = {}
    for path, value in list(_local_paths(content, recipe.data)):
        part: Any = content
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = _shared_weights(value) if path[-1] == "weights" else NOT_SHARED
    return load_recipe_from(content)


def check_shared(file: Path, source: str) -> None:
    """Raises RecipeError for a recipe of another machine that names files or folders. ``source``: for the message."""
    try:
        recipe = load_recipe_from(read_content(file))
    except RecipeError as error:
        message = str(error).replace(str(file), f"{source}: {file.name}")
        raise RecipeError(message if source in message else f"{source}: {file.name}: {message}") from error
    for path, value in _local_paths(recipe.model_dump(mode="json"), recipe.data):
        key = ".".join(map(str, path))
        raise RecipeError(
            f"{source}: {file.name}: {key} = {value!r}: names a file or folder, and a recipe from another machine must "
            "not, since this one would read or write it; ask its author to push the run again with `dist-vpt push`"
        )


def require_dataset(recipe: Recipe, source: str, imported_from: str | None = None) -> None:
    """Raises UserError where a run came without its dataset. ``imported_from``: the program that trained it, if any."""
    if recipe.data.root == NOT_SHARED:
        if imported_from:
            raise UserError(
                f"{source}: was imported from {imported_from}, which names no dataset; give data.root=FOLDER, and "
                "data.format where that is no folder of class folders"
            )
        raise UserError(f"{source}: the folder of its dataset is not shared with it; give data.root=FOLDER")


def missing_weights(recipe: Recipe) -> WeightsFile | None:
    """The weights' file that a shared recipe needs, None: none."""
    found = WEIGHTS.fullmatch(recipe.backbone.weights)
    return WeightsFile(found["name"], found["sha256"]) if found else None


def with_weights(recipe: Recipe, weights: str | None, source: str) -> Recipe:
    """The recipe with ``weights``, a file, where it needs one or where one is given.

    Raises WeightsError where a shared recipe needs a file and none is given, or another one.
    """
    needed = missing_weights(recipe)
    if weights is None:
        if needed is None:
            return recipe
        known = f" (sha256 {needed.sha256})" if needed.sha256 else ""
        raise WeightsError(
            f"{source}: its backbone {recipe.backbone.name} had weights from the file {needed.name}{known}, which is "
            "not shared with the run; get it, and give it with --weights FILE"
        )
    if recipe.backbones:
        raise UserError(f"--weights {weights}: {source} has several backbones; leave it out")
    file = recipe.backbone.model_copy(update={"weights": weights}).file
    if file is None:
        raise UserError(f"--weights {weights}: must be a file of weights")
    require_file(file)
    if needed is not None and needed.sha256 not in (None, sha256_of(file)):
        raise WeightsError(
            f"--weights {file}: another file than {needed.name}, on which {source} was trained: its sha256 is not "
            f"{needed.sha256}; give that file"
        )
    return recipe.changed("backbone", weights=weights)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content."""
    content = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(HASHED_BYTES):
            content.update(part)
    return content.hexdigest()


def _shared_weights(weights: str) -> str:
    file = Path(weights).expanduser()
    name = re.sub(r"[/\\@]", "_", file.name)
    return f"{NOT_SHARED}:{name}@sha256:{sha256_of(file)}" if file.is_file() else f"{NOT_SHARED}:{name}"


def _local_paths(content: dict[str, Any], data: DataConfig) -> Iterator[tuple[KeyPath, str]]:
    """The keys of a recipe whose values name a file or folder, with the values."""
    for path, value in _texts(content):
        key = path[-1]
        if path[0] in ("backbone", "backbones") and key == "weights":
            named = value not in ("pretrained", "random") and not WEIGHTS.fullmatch(value)
        elif path == ("data", "root"):  # the hf format reads a folder of that name first
            on_hub = data.stored == "hf" and DATASET_ID.fullmatch(value) and not Path(value).exists()
            named = value != NOT_SHARED and not on_hub
        elif path[0] == "sweep" and PLACES & set(path):
            named = value not in ("pretrained", "random", NOT_SHARED)
        else:
            named = path[:2] in FOLDERS or _is_path(value)
        if named:
            yield path, value


def _is_path(value: str) -> bool:
    parts = value.replace("\\", "/").split("/")
    return value.startswith(("/", "\\", "~")) or ".." in parts or re.match(r"[A-Za-z]:[\\/]", value) is not None


def _texts(value: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, (*at, number))
