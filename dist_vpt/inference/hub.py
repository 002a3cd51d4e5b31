"""Runs on the Hugging Face hub: ``hub:user/name`` in place of a run folder.

Only the files that ``push`` writes are downloaded: safetensors, JSON, YAML and Markdown. None of them is code, none is
a pickle, and a recipe that names files or folders of this machine is refused. Where they are kept, the token and the
address of the hub are huggingface_hub's (``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``).
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dist_vpt.errors import UserError, WeightsError
from dist_vpt.recipe.sharing import check_shared
from dist_vpt.runs.folder import RunFolder

PREFIX = "hub:"
FORM = "hub:USER/NAME, or hub:USER/NAME@REVISION for a branch, tag or commit"
RUN_FILES = ("adapters.safetensors", "recipe.yaml", "result.json", "classes.json", "README.md")
NEEDED = ("adapters.safetensors", "recipe.yaml")
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".npy", ".npz", ".h5")
LOGIN = "run `hf auth login`, or set HF_TOKEN"


class HubId(NamedTuple):
    """A repository of models on the hub."""

    repo: str  # user/name
    revision: str | None  # branch, tag or commit; None: main

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}{f'@{self.revision}' if self.revision else ''}"


def open_run(run: str) -> RunFolder:
    """The folder of a RUN argument: a path, or ``hub:user/name``, which is downloaded. Raises UserError for a sweep."""
    folder = RunFolder(fetch(run) if is_hub_id(run) else run)
    folder.refuse_sweep()
    return folder


def adapters_file(folder: RunFolder, adapters: str) -> Path:
    """The run's file of its last or best adapters. Raises UserError for the best of a run that came with one."""
    if adapters == "best" and not folder.best.is_file() and folder.result.is_file():
        if origin := folder.imported_from():
            raise UserError(f"--adapters best: {folder.path} was imported from {origin} with one adapter; leave it out")
        if not folder.info.is_file():
            raise UserError(f"--adapters best: {folder.path} was shared with one file of adapters; leave it out")
    return folder.best if adapters == "best" else folder.adapters


def is_hub_id(run: str) -> bool:
    return run.startswith(PREFIX)


def parse_id(text: str) -> HubId:
    """``hub:user/name`` or ``hub:user/name@revision``. Raises UserError for another text."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo, at, revision = text.removeprefix(PREFIX).partition("@")
    try:
        validate_repo_id(repo)
        well_formed = is_hub_id(text) and repo.count("/") == 1 and bool(revision) == bool(at)
        reason = ""
    except HFValidationError as error:
        well_formed, reason = False, f" ({str(error).splitlines()[0].rstrip('.')})"
    if well_formed and not re.search(r"\s|\.\.", revision):
        return HubId(repo, revision or None)
    raise UserError(f"{text}: not the name of a repository on the hub{reason}; write {FORM}")


def fetch(run: str, revision: str | None = None) -> Path:
    """The folder with the files of a run on the hub, in huggingface_hub's cache: for reading, not for writing.

    ``run``: ``hub:user/name``. A copy in the cache serves where the hub cannot be reached.

    Raises UserError where there is no such repository, no permission, or neither a network nor a copy; WeightsError
    where the repository holds no run, and where it holds a pickle in place of one; RecipeError for a recipe that names
    files of this machine.
    """
    hub_id = parse_id(run)
    if revision is not None:
        hub_id = hub_id._replace(revision=revision)
    folder = download(hub_id, RUN_FILES)
    if not all((folder / name).is_file() for name in NEEDED):
        raise WeightsError(f"{hub_id}: {_other_content(hub_id)}")
    check_shared(folder / "recipe.yaml", str(hub_id))
    return folder


def download(hub_id: HubId, names: Sequence[str]) -> Path:
    """The folder in the cache with those of the named files that a repository has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()  # for files this small a bar would be all that is seen
    logging.set_verbosity_error()  # that a repository has none of these files is said below, with the fix
    try:
        with explaining(hub_id, "cannot be downloaded"):
            return Path(snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=list(names)))
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


def _other_content(hub_id: HubId) -> str:
    """What a repository holds in place of a run, with the fix."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(hub_id.repo, revision=hub_id.revision)
    except Exception:  # without a network, or any of the hub's many errors: that it holds no run is known already
        names = []
    pickles = [name for name in names if PurePosixPath(name).suffix in PICKLES]
    if set(PEFT_FILES) <= set(names):
        return "holds an adapter of PEFT, and no run; make a run of it with `dist-vpt import-peft`"
    if pickles and not any(name in names for name in NEEDED):
        return (
            f"holds {pickles[0]}, and no run; a file of this kind may run code when it is read, so it is not "
            "downloaded; ask for safetensors, or train here"
        )
    missing = " and ".join(name for name in NEEDED if name not in names)
    return f"holds no run ({missing} missing); name a repository that `dist-vpt push` has written"


@contextmanager
def explaining(hub_id: HubId, what: str) -> Iterator[None]:
    """Raise a UserError with the reason and the fix for any error of the hub and of the network."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub raises many types, those of its HTTP library among them
        raise UserError(f"{hub_id}: {what}: {_reason(error, hub_id)}") from error


def _reason(error: Exception, hub_id: HubId) -> str:
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE and isinstance(error, errors.OfflineModeIsEnabled | errors.EntryNotFoundError):
        return "HF_HUB_OFFLINE is set, and the cache has no whole copy; unset it and load the run once"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner grants access on request; ask for it on {constants.ENDPOINT}/{hub_id.repo}, then {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {hub_id.revision}; name a branch, tag or commit of the repository"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private; correct the name, or {LOGIN}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    owner = hub_id.repo.partition("/")[0]
    answers = {
        None: f"{_first_line(error)}; check the connection to {constants.ENDPOINT} and try again",
        401: f"the hub does not accept the token; {LOGIN}",
        403: f"the token has no permission; use one that may write to {owner}: {LOGIN}",
    }
    if isinstance(error, errors.LocalEntryNotFoundError):  # huggingface_hub's for "no network and no copy"
        cause = _first_line(error.__cause__ or error)
        return f"{constants.ENDPOINT} cannot be reached ({cause}), and the cache has no whole copy; try again"
    return answers.get(status, f"the hub answers with status {status} ({_first_line(error)}); try again later")


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
