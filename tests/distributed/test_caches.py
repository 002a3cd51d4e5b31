"""Caches of libraries where the home cannot be written, and messages of libraries on the terminal."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_vpt.distributed.caches import CACHES, move_unwritable_caches
from dist_vpt.distributed.rank_log import RankLog, held_messages, prints_as_messages, quiet_libraries
from tests.running import TINY

NOBODY = 54321  # a number without a name


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_nothing_moves_where_the_home_can_be_written(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert move_unwritable_caches(environ) == ""
    assert environ == {"HOME": str(tmp_path)}
    assert list(tmp_path.iterdir()) == []


def test_all_move_where_it_cannot(tmp_path: Path) -> None:
    file = tmp_path / "home"
    file.write_text("")  # no folder: nobody can write below it, not even root
    environ = {"HOME": str(file), "HF_HOME": "/models"}
    line = move_unwritable_caches(environ)
    base = tmp_path / f"dist_vpt-{os.getuid()}"
    assert line.startswith(f"note: {file} cannot be written, so caches of libraries are in {base}; set HOME or TORCH_")
    assert environ["HF_HOME"] == "/models"  # what is set stays
    assert {name for name in CACHES if environ[name].startswith(str(base))} == CACHES.keys() - {"HF_HOME"}
    assert base.stat().st_mode & 0o777 == 0o700
    assert move_unwritable_caches(environ) == ""  # of a process that this one starts


def test_the_cache_folder_counts_where_it_is_set(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    environ = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    move_unwritable_caches(environ)
    assert "TORCH_HOME" not in environ
    assert "MPLCONFIGDIR" in environ  # it is below the home


def test_a_folder_that_another_user_has_made_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / f"dist_vpt-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "home").write_text("")
    environ = {"HOME": str(tmp_path / "home")}
    assert "note: " in move_unwritable_caches(environ)
    assert not Path(environ["TORCH_HOME"]).parent.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize("user", ["no HOME", "HOME is no folder", "no name"])
def test_commands_of_a_user_without_a_home(user: str, tmp_path: Path) -> None:
    """A training, its scores and the doctor: exit code 0 and no traceback."""
    if user == "no name" and os.getuid():
        pytest.skip("becomes another user, for which it has to be root")
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    environ = {"PATH": os.environ["PATH"], "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    (tmp_path / "home").write_text("")  # nobody can write below a file, not even root
    environ |= {"HOME": str(tmp_path / "home")} if user != "no HOME" else {}
    before = []
    if user == "no name":  # which may read what root may
        before = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        before += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    train = ["train", "base", *TINY, "data.task=digits", "method.name=linear", f"run.dir={place / 'run'}"]
    for command in [train, ["eval", str(place / "run")], ["doctor"]] if user == "no name" else [train]:
        words = [*before, sys.executable, "-m", "dist_vpt", *command]
        done = subprocess.run(words, cwd=place, env=environ, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert [line for line in done.stderr.splitlines() if not line.startswith("note: ")] == []


def _fail_after_a_print() -> None:
    with prints_as_messages("DeepSpeed"):
        print("no compiler")
        raise ZeroDivisionError


def test_messages_of_libraries_go_to_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet_libraries()
    noisy, log = logging.getLogger("DeepSpeed"), RankLog(tmp_path / "logs" / "rank-1.log", captures_all=False)
    try:
        noisy.warning("before the folder")
        log.open("")
        noisy.warning("with the folder")
        with prints_as_messages("DeepSpeed"):
            print("an op was built\n")
        with pytest.raises(ZeroDivisionError):
            _fail_after_a_print()
        print("not a library's")
        noisy.error("an error")
    finally:
        log.close()
        noisy.removeFilter(held_messages)
    text = (tmp_path / "logs" / "rank-1.log").read_text()
    places = [text.index(each) for each in ("before the folder", "with the folder", "an op was built", "no compiler")]
    assert places == sorted(places)
    assert capsys.readouterr().out == "not a library's\n"
    assert [record.message for record in caplog.records] == ["an error"]  # what reaches other handlers: the terminal's
