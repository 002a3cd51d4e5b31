"""Who may write in a run folder, and what a file in it looks like at any moment."""

import fcntl
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_vpt import __version__
from dist_vpt.errors import Interrupted, RunFailed, RunFolderError
from dist_vpt.files import write_atomically
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs import folder as folder_module
from dist_vpt.runs import provenance
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.provenance import git_revision, versions

# Holds the folder in argv[1] until its standard input ends.
HOLDER = """
import sys
import time
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.folder import RunFolder
with RunFolder(sys.argv[1]).acquire(load_recipe([], ["run.dir=" + sys.argv[1]])):
    print("held", flush=True)
    sys.stdin.read()
"""


def recipe(folder: RunFolder, *overrides: str) -> Recipe:
    return load_recipe([], [f"run.dir={folder.path}", *overrides])


def files(path: Path) -> dict[str, bytes]:
    """Every file below a folder but its lock, with its content."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "one")


def use(folder: RunFolder, *overrides: str, then: BaseException | None = None, status: str = "done") -> None:
    """A run in the folder, to its end or to an error."""
    with folder.acquire(recipe(folder, *overrides)) as done:
        assert not done
        if then is not None:
            raise then
        folder.mark(status)


def refused(folder: RunFolder, *overrides: str) -> str:
    """The message of a refusal, which leaves the folder as it was."""
    before = files(folder.path)
    with pytest.raises(RunFolderError) as caught, folder.acquire(recipe(folder, *overrides)):
        pytest.fail("the folder was given away")
    assert files(folder.path) == before
    return str(caught.value)


def test_a_new_folder_gets_the_recipe_and_where_it_came_from(folder: RunFolder) -> None:
    with folder.acquire(recipe(folder, "optim.lr=0.3")) as done:
        assert not done
        status = folder.status()
        assert status["status"] == "running"
        assert status["pid"] == os.getpid()
        assert status["versions"] == versions()
        assert status["git"] == git_revision()
        assert status["command"]
        assert status["started"] == status["updated"]
        assert folder.load() == recipe(folder, "optim.lr=0.3")
        folder.mark("done", more=1)
    assert folder.status()["status"] == "done"
    assert folder.status()["more"] == 1
    assert {p.name for p in folder.path.iterdir()} == {".lock", "recipe.yaml", "run.json"}


def test_an_empty_folder_may_be_used(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    use(folder)


@pytest.mark.parametrize("status", ["done", "running", "interrupted"])
def test_a_used_folder_is_refused(folder: RunFolder, status: str) -> None:
    use(folder, status=status)
    message = refused(folder)
    assert f"{folder.path}: holds a run already (status: {status})" in message
    assert "run.resume=auto" in message


def test_a_used_folder_goes_on_with_auto(folder: RunFolder) -> None:
    with pytest.raises(Interrupted):
        use(folder, then=Interrupted("stopped by a signal"))
    assert folder.status()["reason"] == "stopped by a signal"
    started = folder.status()["started"]
    with folder.acquire(recipe(folder, "run.resume=auto")) as done:
        assert not done
        assert folder.status()["status"] == "running"
        assert folder.status()["started"] == started
        assert "reason" not in folder.status()


def test_a_finished_run_is_done_with_auto(folder: RunFolder) -> None:
    use(folder)
    before = files(folder.path)
    with folder.acquire(recipe(folder, "run.resume=auto")) as done:
        assert done
    assert files(folder.path) == before


@pytest.mark.parametrize("status", ["done", "interrupted"])
def test_another_recipes_run_is_refused_and_the_difference_named(folder: RunFolder, status: str) -> None:
    use(folder, "optim.lr=0.1", status=status)
    message = refused(folder, "optim.lr=0.2", "method.name=linear", "run.resume=auto")
    assert "holds the run of another recipe" in message
    assert "\n  optim.lr: 0.1 -> 0.2" in message
    assert "\n  method.name: vpt -> linear" in message
    assert "run.resume" not in message


@pytest.mark.parametrize(
    "change",
    [
        "data.workers=3",
        "data.cache=memory",
        "data.on_decode_error=skip",
        "train.eval_batch_size=7",
        "run.log_every=3",
        "run.timeout_minutes=1",
        "runtime.activation_checkpointing=block",
        "runtime.offload=true",
        "runtime.memory_check=ignore",
    ],
)
def test_what_changes_no_number_may_differ(folder: RunFolder, change: str) -> None:
    use(folder, status="interrupted")
    use(folder, change, "run.resume=auto")


@pytest.mark.parametrize(
    "change", ["seed=1", "train.batch_size=8", "runtime.precision=bf16", "train.grad_accum_steps=2"]
)
def test_what_changes_numbers_may_not_differ(folder: RunFolder, change: str) -> None:
    use(folder, status="interrupted")
    assert "another recipe" in refused(folder, change, "run.resume=auto")


def test_a_beginning_that_is_cut_short_leaves_a_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    use(folder, status="failed")
    (folder.path / ".pass-1.pt").write_bytes(b"hours of work")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dist_vpt.runs.folder.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            use(folder, "run.resume=auto")
    use(folder, "run.resume=auto")
    assert (folder.path / ".pass-1.pt").exists()


def test_a_folder_of_other_files_is_refused_and_left_alone(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("ten years of work")
    for resume in ("never", "auto"):
        message = refused(folder, f"run.resume={resume}")
        assert "holds files (thesis.tex) but no run" in message
    assert [p.name for p in folder.path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["file", "file/below", "closed/below"])
def test_where_no_folder_can_be(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")

    def closed(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    if place.startswith("closed"):  # root may write anywhere, so that a mode would not show it
        monkeypatch.setattr(Path, "mkdir", closed)
    message = refused(RunFolder(tmp_path / place))
    assert "cannot be a run folder" in message
    assert "choose another run.dir" in message


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("begun", [False, True])
def test_a_claim_on_a_full_disk_leaves_the_folder_as_it_was(
    writes: int, begun: bool, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, replace, left = ["run.resume=auto"] * begun, os.replace, [None] * writes
    if begun:
        use(folder, *options, status="interrupted")

    def full(*paths: Any) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    message = refused(folder, *options)
    assert f"{folder.path}: cannot be written ([Errno 28] No space left on device); free space" in message
    monkeypatch.undo()
    use(folder, *options)


def test_a_lock_whose_owner_cannot_be_written_down_is_one(folder: RunFolder) -> None:
    """Nor does closing it bring up an error of its own; a file size of 0 bytes is a full disk to the lock alone."""
    use(folder, status="interrupted")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        message = refused(folder, "run.resume=auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "cannot be written ([Errno 27] File too large" in message


def test_a_file_system_without_locks_is_told(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    message = refused(folder)
    assert "this file system has no locks (No locks available); mount it with them (Lustre: flock), or" in message


def test_a_run_that_failed_before_it_saved_anything_is_replaced(folder: RunFolder) -> None:
    with pytest.raises(RunFailed):
        use(folder, then=RunFailed("the loss is nan"))
    assert folder.status()["status"] == "failed"
    assert folder.status()["reason"] == "the loss is nan"
    folder.metrics.write_text("{}\n")
    folder.log.write_text("old\n")
    (folder.path / "tb").mkdir()
    (folder.path / "tb" / "events").write_text("old")
    (folder.path / "notes.txt").write_text("mine")
    use(folder, "optim.lr=0.1")
    assert set(files(folder.path)) == {"recipe.yaml", "run.json", "notes.txt"}
    assert folder.load().optim.lr == 0.1


@pytest.mark.parametrize("change", ["run.resume=auto", "data.workers=3"])
def test_the_next_attempt_keeps_why_the_one_before_failed(folder: RunFolder, change: str) -> None:
    with pytest.raises(RunFailed):
        use(folder, then=RunFailed("the loss is nan"))
    (folder.path / "logs").mkdir()
    (folder.path / "logs" / "rank-1.log").write_text("Traceback\n")
    folder.log.write_text("old\n")
    folder.metrics.write_text("{}\n")
    use(folder, change)
    assert (folder.path / "logs" / "rank-1.log").read_text() == "Traceback\n"
    assert folder.log.read_text() == "old\n"
    assert not folder.metrics.exists()


@pytest.mark.parametrize(
    "kept",
    [
        "state/step-00000001/state.json",
        "adapters.safetensors",
        "best.safetensors",
        "trials/000.json",  # of a sweep
        "seeds/44.json",
    ],
)
def test_a_failed_run_that_saved_something_is_kept(folder: RunFolder, kept: str) -> None:
    with pytest.raises(RunFailed):
        use(folder, then=RunFailed("the loss is nan"))
    (folder.path / kept).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / kept).write_text("precious")
    assert "holds a run already (status: failed)" in refused(folder)
    use(folder, "run.resume=auto")
    assert (folder.path / kept).read_text() == "precious"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Interrupted("stop"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (RunFailed("nan"), "failed"),
        (RuntimeError("a bug"), "failed"),
        (SystemExit(1), "failed"),
    ],
)
def test_how_a_run_ended_is_written_down(folder: RunFolder, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)):
        use(folder, then=error)
    assert folder.status()["status"] == status
    assert folder.status()["reason"] == (str(error) or type(error).__name__)


def test_two_runs_at_once(folder: RunFolder) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for resume in ("never", "auto"):
            message = refused(folder, f"run.resume={resume}")
            assert f"another run is at work here (process {other.pid} on {platform.node()} since " in message
        other.kill()  # a killed process leaves no lock behind
    assert "status: running" in refused(folder)
    use(folder, "run.resume=auto")


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
def test_a_damaged_folder(folder: RunFolder, name: str) -> None:
    use(folder)
    (folder.path / name).write_text("{")
    with pytest.raises(ValueError, match=name) as caught:
        use(folder, "run.resume=auto")
    assert caught.type.__name__ in ("RunFolderError", "RecipeError")


def test_a_recipe_that_a_machine_sees_late(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "SEEN_SECONDS", 0.1)
    assert not folder.seen()
    monkeypatch.setattr(folder_module, "SEEN_SECONDS", 90.0)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: use(folder))  # which needs the true one
    monkeypatch.setattr(folder_module, "time", clock)
    assert folder.seen()


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder(tmp_path / "nix").load()


def test_overrides_go_on_top_of_a_runs_recipe(folder: RunFolder) -> None:
    use(folder, "optim.lr=0.3")
    assert folder.load(["data.workers=7"]) == recipe(folder, "optim.lr=0.3", "data.workers=7")


# Files


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "ü")
    assert path.read_bytes() == "ü".encode()
    write_atomically(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_write_left_does_not_make_a_folder_foreign(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    left = [folder.path / name for name in (".recipe.yaml.123.tmp", ".adapters.safetensors.7.tmp")]
    for path in left:
        path.write_text("half")
    (folder.path / ".thesis.tex.123.tmp").write_text("not ours")
    use(folder)
    assert set(files(folder.path)) == {"recipe.yaml", "run.json", ".thesis.tex.123.tmp"}


# Where numbers come from


def test_versions() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert torch.__version__.startswith(found["torch"])  # which may add the build, as in +cpu
    assert found["dist-vpt"] == __version__
    assert set(found) == {"python", *provenance.VERSIONS_OF}


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "VERSIONS_OF", ("torch", "no-such-package"))
    assert set(versions()) == {"python", "torch"}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A git repository that the package believes to lie in; gives git's answers."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "runfolder.py").write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "runfolder.py"))
    return git


def test_git_revision_and_changes_to_it(repository: Callable[..., str], tmp_path: Path) -> None:
    assert git_revision() is None  # in somebody's repository, not of it
    repository("add", "runfolder.py")
    assert git_revision() is None  # no commit yet
    repository("commit", "-qm", "one")
    revision = repository("rev-parse", "HEAD")
    assert git_revision() == revision
    (tmp_path / "new.txt").write_text("not tracked")
    assert git_revision() == revision
    (tmp_path / "runfolder.py").write_text("2")
    assert git_revision() == f"{revision}+changes"


def test_no_git_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_revision() is None


def test_run_json_is_plain_json(folder: RunFolder) -> None:
    use(folder)
    assert json.loads(folder.info.read_text())["status"] == "done"


def test_who_waits_sees_whether_a_run_was_begun_by_who_holds_its_folder(tmp_path: Path) -> None:
    recipe = load_recipe([], [f"run.dir={tmp_path / 'run'}", "run.resume=auto"])
    folder, waiting = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert not waiting.under_way()
    with folder.acquire(recipe):
        assert waiting.under_way()
        left = folder.info.read_bytes()
    folder.info.write_bytes(left)  # as after a kill
    assert not waiting.under_way()
    with folder._locked():  # started again, and about to begin
        assert waiting.holds(recipe, "run")
        assert not waiting.under_way()
