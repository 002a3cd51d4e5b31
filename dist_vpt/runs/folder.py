"""The run folder: its files, its lock and its status."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from dist_vpt.distributed.limits import file_size_advice
from dist_vpt.errors import Interrupted, RunFolderError, UserError
from dist_vpt.files import LOOK_SECONDS, is_locked, locked, read_json, write_atomically
from dist_vpt.recipe.differences import RESUMABLE_KEYS, differences
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.provenance import provenance

# What a run writes; nothing else in its folder is ever removed. The recipe is last: it makes the folder a run's.
RUN_FILES = (
    "run.json",
    "result.json",
    "metrics.jsonl",
    "train.log",
    "state",
    "adapters.safetensors",
    "best.safetensors",
    "splits.json",
    "confusion.csv",
    "per_class.csv",
    "predictions.csv",
    "tb",
    "wandb",
    ".aim",
    "dvclive",
    "swanlog",
    "ranks",
    "logs",
    "recipe.yaml",
)
RESUME_HINT = "the same command resumes"  # of sweeps and compressions
STOPPED = (Interrupted.exit_code, Interrupted.BY_KEYBOARD)  # exit codes
LOGS = ("train.log", "logs")  # a run that is started again appends to them
SEEN_SECONDS = 90.0  # until a new file appears on other nodes (on NFS at most a minute)


class RunFolder:
    """``runs/NAME``: recipe.yaml, run.json, metrics.jsonl, train.log, result.json, adapters, splits, state/ and tb/.

    What its processes report (ranks/, logs/) is written by distributed/.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe, self.info = self.path / "recipe.yaml", self.path / "run.json"
        self.result, self.splits = self.path / "result.json", self.path / "splits.json"
        self.metrics, self.log, self.state = self.path / "metrics.jsonl", self.path / "train.log", self.path / "state"
        self.adapters, self.best = self.path / "adapters.safetensors", self.path / "best.safetensors"
        self._holder = ""  # this process, since it last took the folder

    def load(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe that the run was started with, with overrides on top."""
        if not self.recipe.is_file():
            raise RunFolderError(f"{self.path}: not a run folder (no recipe.yaml); name a folder that `train` wrote")
        return load_recipe([self.recipe], [*self._keys_of_older_versions(), *overrides])

    def precision(self) -> str | None:
        """That of the run or sweep that has begun here; None before, and where it failed with nothing saved."""
        begun = self.recipe.is_file() and not self._failed_empty()
        return self.load().runtime.precision if begun else None

    def _keys_of_older_versions(self) -> list[str]:
        """What a run of a version without these keys did: it had the published settings alone."""
        try:
            written = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):  # loading it reports what is wrong
            return []
        if not isinstance(written, dict) or "protocol" in written or not isinstance(written.get("method"), dict):
            return []
        keys = ["protocol=published", "method.head=published"]
        if written["method"].get("name") == "vqt":
            keys.append("method.init=random")
        backbone = written.get("backbone")
        if not isinstance(backbone, dict) or not backbone.get("position_resize"):
            keys.append("backbone.position_resize=null")
        return keys

    def status(self) -> dict[str, Any]:
        """run.json, or nothing before the run began."""
        return read_json(self.info) if self.info.is_file() else {}

    @contextmanager
    def acquire(self, recipe: Recipe, kind: str = "run") -> Iterator[bool]:
        """Lock the folder for one run or sweep, on the main process; yields whether its run is done already.

        Raises RunFolderError where another process has locked the folder, where it holds another recipe's run or, with
        run.resume=never, any run, and where it holds other files.
        """
        with self._locked():
            try:
                done = self._begin(recipe, kind)
            except OSError as error:  # an uncaught OSError would leave the other processes waiting
                fix = file_size_advice(error) or "free space there or choose another run.dir"
                raise RunFolderError(f"{self.path}: cannot be written ({error}); {fix}") from error
            if done:
                yield True
                return
            try:
                yield False
            except BaseException as error:
                interrupted = getattr(error, "exit_code", 1) in STOPPED or isinstance(error, KeyboardInterrupt)
                # A figure that fails after the result changes nothing; another process may have reported first.
                if self.status().get("status") == "running":
                    with suppress(OSError):  # a full disk must not hide the error
                        self.mark("interrupted" if interrupted else "failed", reason=str(error) or type(error).__name__)
                raise

    def under_way(self) -> bool:
        """Whether the process that started the run in this folder still holds its lock."""
        if not is_locked(self.path / ".lock"):  # first: a new holder writes its name after locking
            return False
        try:
            holder = (self.path / ".lock").read_text()
        except OSError:
            return False
        return holder == self.status().get("holder")

    def mark(self, status: str, **facts: Any) -> None:
        """Set the run's status and facts in run.json."""
        kept = {k: v for k, v in self.status().items() if k != "reason"}
        content = {**kept, "updated": timestamp(), **facts, "status": status}
        write_atomically(self.info, json.dumps(content, indent=1) + "\n")

    def _begin(self, recipe: Recipe, kind: str) -> bool:
        """Start this recipe in the folder, unless it is done already; returns whether it is done."""
        self._admit(recipe, kind)
        if self.status().get("status") == "done":
            return True
        shutil.rmtree(self.path / "ranks", ignore_errors=True)  # reported by processes of an earlier start
        for left in (path for name in RUN_FILES for path in self.path.glob(f".{name}.*.tmp")):
            left.unlink(missing_ok=True)  # left by a killed process: no other process writes these
        begun = self.recipe.is_file()
        try:
            write_atomically(self.recipe, recipe.to_yaml())
            now = timestamp()
            started = self.status().get("started") or now
            self.mark("running", kind=kind, started=started, **provenance(), holder=self._holder, updated=now)
        except OSError:
            if not begun:  # a recipe without run.json would be taken for a run
                self.recipe.unlink(missing_ok=True)
            raise
        return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.path / ".lock"
        try:
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            lock.touch()
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be a run folder ({error}); choose another run.dir") from error
        self._holder = f"process {os.getpid()} on {socket.gethostname()} since {timestamp('microseconds')}"
        with locked(lock, "choose another run.dir", timeout=LOOK_SECONDS, holder=self._holder) as acquired:
            if not acquired:
                raise self._at_work()
            yield

    def _at_work(self) -> RunFolderError:
        holder = (self.path / ".lock").read_text().strip() or "unknown process"
        return RunFolderError(
            f"{self.path}: another run is at work here ({holder}); wait for its end or choose another run.dir"
        )

    def write_splits(self, images: Mapping[str, Sequence[str]]) -> None:
        """Write which images splits have that a seed made. Raises RunFolderError where the run began with others."""
        before = read_json(self.splits) if self.splits.is_file() else {}
        for name, files in images.items():
            if name in before and _below_folder(before[name]) != _below_folder(files):
                raise RunFolderError(
                    f"{self.splits}: split {name!r} had other images when this run began: the dataset has changed; "
                    "restore it, or choose another run.dir"
                )
        write_atomically(self.splits, json.dumps(images, indent=1) + "\n")

    def imported_from(self) -> str | None:
        """The program that trained the run's adapters, PEFT; None where it was not imported."""
        return read_json(self.result).get("imported_from") if self.result.is_file() else None

    def refuse_sweep(self) -> None:
        """Raises RunFolderError where the folder holds a sweep, and a run is expected."""
        if self.status().get("kind") == "sweep":
            raise RunFolderError(f"{self.path}: is a sweep; name one of its runs, such as {self.path}/seeds/SEED")

    def refuse_other(self, recipe: Recipe, kind: str = "run") -> None:
        """Raises RunFolderError, as ``acquire`` would, where the folder cannot take this recipe; changes nothing."""
        if not self._found():
            return
        self._refuse_foreign()
        if is_locked(self.path / ".lock"):
            raise self._at_work()
        if not self._failed_empty():
            self._refuse_run(recipe, kind)

    def holds(self, recipe: Recipe, kind: str) -> bool:
        """Whether any process has started this recipe's run or sweep in the folder."""
        status = self.status()
        begun = status.get("status") in ("running", "done") and status.get("kind") == kind and self.recipe.is_file()
        return begun and not self._changed(recipe)

    def seen(self) -> bool:
        """Wait for the recipe of a run that the main process has started: on another node the file may appear late."""
        deadline = time.monotonic() + SEEN_SECONDS
        while not self.recipe.is_file():
            if time.monotonic() > deadline:
                return False
            time.sleep(min(1.0, SEEN_SECONDS))
        return True

    def _changed(self, recipe: Recipe) -> list[str]:
        stored = self.load()
        if recipe.runtime.precision == "auto":  # what has begun keeps what it came to
            recipe = recipe.changed("runtime", precision=stored.runtime.precision)
        return [d for d in differences(stored, recipe) if not d.startswith(RESUMABLE_KEYS)]

    def _admit(self, recipe: Recipe, kind: str) -> None:
        if not self._found():
            return
        self._refuse_foreign()
        if self._failed_empty():
            kept: Sequence[str] = ()
            with suppress(UserError):  # where the recipe cannot be read nothing is kept
                kept = () if self._changed(recipe) else (*LOGS, "recipe.yaml")  # without it this is no run folder
            for name in RUN_FILES:  # a run that failed before it saved anything has nothing to lose but its logs
                path = self.path / name
                if name not in kept:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            return
        self._refuse_run(recipe, kind)

    def _failed_empty(self) -> bool:
        """Whether the run here failed before it saved anything."""
        saved = (self.state, self.adapters, self.best, self.path / "trials", self.path / "seeds")  # of a sweep, too
        return self.status().get("status") == "failed" and not any(path.exists() for path in saved)

    def _refuse_run(self, recipe: Recipe, kind: str) -> None:
        found, status = self.status().get("kind", kind), self.status().get("status")
        if found != kind:
            raise RunFolderError(f"{self.path}: holds a {found}, not a {kind}; choose another run.dir")
        if recipe.run.resume == "never":
            raise RunFolderError(
                f"{self.path}: holds a run already (status: {status}); "
                "use run.resume=auto to resume it, or choose another run.dir"
            )
        changed = self._changed(recipe)
        if changed:
            raise RunFolderError(
                f"{self.path}: holds the run of another recipe; choose another run.dir, or undo:\n"
                + "\n".join(f"  {change}" for change in changed)
            )

    def _found(self) -> list[str]:
        """Names of the files here, except the lock and temporary ones of killed processes."""
        try:
            if not self.path.is_dir():
                return []
        except OSError as error:  # too long a name, or a folder above that cannot be entered
            raise RunFolderError(f"{self.path}: cannot be a run folder ({error.strerror}); choose another") from error
        return sorted(p.name for p in self.path.iterdir() if p.name != ".lock" and p.suffix != ".tmp")

    def _refuse_foreign(self) -> None:
        found = self._found()
        if found and not self.recipe.is_file():
            raise RunFolderError(
                f"{self.path}: holds files ({', '.join(found[:3])}) but no run; choose another run.dir"
            )


def _below_folder(files: Sequence[str]) -> list[str]:
    """Paths below the folder that all share: a dataset may be moved."""
    first, last = min(files, default=""), max(files, default="")  # all others share what these do
    same = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return [file[first.rfind("/", 0, same) + 1 :] for file in files]


def timestamp(precision: str = "seconds") -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec=precision)
