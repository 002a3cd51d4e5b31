"""Folders in which libraries keep what they compile and download, for users whose home cannot be written.

A container or a cluster may run a process under a number without a name and without a home. Each library then fails in
its own way, most of them late.
"""

import os
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# Variable of a library -> its folder where the variable is not set, below the cache folder or (~) the home.
CACHES = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCH_HOME": "torch",
    "HF_HOME": "huggingface",
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "TRITON_HOME": "~",  # what is autotuned
    "MPLCONFIGDIR": "~/.config/matplotlib",
}


def move_unwritable_caches(environ: MutableMapping[str, str] = os.environ) -> str:
    """Set the variables of caches that cannot be written to folders of this user below the folder for temporary files.

    Variables that are set stay. Returns a line for the log, or "" where nothing was moved: also in a process started
    by one that has moved them.
    """
    moved = [
        name for name, folder in CACHES.items() if name not in environ and not _writable(_default(folder, environ))
    ]
    if not moved:
        return ""
    base = _own_folder(Path(tempfile.gettempdir()) / f"dist_vpt-{os.getuid()}")
    for name in moved:
        environ[name] = str(base / name.lower().removesuffix("_dir"))
    return (
        f"note: {_home(environ) or 'the home'} cannot be written, so caches of libraries are in {base}; set HOME or "
        f"{', '.join(moved)} to keep them elsewhere"
    )


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder for what this package itself keeps between runs; None for a user without a home."""
    return _default("dist_vpt", environ)


def _default(folder: str, environ: Mapping[str, str]) -> Path | None:
    home = _home(environ)
    if folder.startswith("~"):
        return None if home is None else home / folder.removeprefix("~").removeprefix("/")
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / folder
    return None if home is None else home / ".cache" / folder


def _home(environ: Mapping[str, str]) -> Path | None:
    """The home of this user, None where there is none: HOME is not set and the user has no entry in passwd."""
    home = environ.get("HOME") or os.path.expanduser(f"~{_user_name()}")
    return None if home.startswith("~") else Path(home)


def _user_name() -> str:
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return "-"  # no name of a user


def _writable(folder: Path | None) -> bool:
    """Whether a folder, or the one in which it would be created, can be written."""
    if folder is None:
        return False
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except (OSError, StopIteration):
        return False
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _own_folder(path: Path) -> Path:
    """This folder, created for this user alone; another one where somebody else has taken its name."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="dist_vpt-"))
