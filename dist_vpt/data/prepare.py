"""``dist-vpt data prepare``: download and prepare the known tasks that TensorFlow Datasets has."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_vpt.data.formats import tfds
from dist_vpt.data.tasks import Tfds, published_task
from dist_vpt.errors import UserError


def prepare(root: str, tasks: Sequence[str], file_format: str = "array_record") -> None:
    """Download and prepare the builders of tasks with tensorflow-datasets and TensorFlow.

    All tasks are tried. Raises UserError at the end with what could not be prepared and what to download by hand.
    """
    published = [published_task(name) for name in tasks]
    unknown = [task.name for task in published if task.tfds is None]
    if unknown:
        raise UserError(
            f"{unknown[0]}: TensorFlow Datasets does not have it; the head of its recipe says which folder to make: "
            f"`dist-vpt recipe copy {unknown[0]}`"
        )
    library, console, failed = tfds.packages(), Console(highlight=False), []
    left: dict[str, Tfds] = {}
    for task in published:
        assert task.tfds is not None
        found = tfds.find(Path(root), task.tfds)
        if found is None:
            left[task.tfds.builder] = task.tfds  # one builder may serve two tasks
        else:
            console.print(f"{task.name}: already prepared, {found}", soft_wrap=True)
    if left and not _has_tensorflow():
        raise UserError("preparing needs TensorFlow, training does not: pip install 'dist-vpt[prepare]'")
    for name, wanted in left.items():
        builder: Any = None
        console.print(f"{name}: preparing in {root}", soft_wrap=True)
        try:
            builder = _builder(wanted, library, root)
            _prepare(builder, library, file_format)
        except Exception as error:  # downloads fail in many ways; the remaining datasets continue
            failed.append(f"{name}: {_reason(builder, error)}")
            continue
        console.print(f"{name}: done")
    if failed:
        raise UserError("\n".join(failed))


def _has_tensorflow() -> bool:
    return find_spec("tensorflow") is not None


def _builder(wanted: Tfds, library: Any, root: str) -> Any:
    """The builder of the version of the published numbers, or of the newest if that version is not available."""
    try:
        return library.builder(wanted.builder, version=wanted.version, data_dir=root)
    except AssertionError:
        return library.builder(wanted.builder, data_dir=root)


def _prepare(builder: Any, library: Any, file_format: str) -> None:
    config = library.download.DownloadConfig(compute_stats=library.download.ComputeStatsMode.SKIP)
    builder.download_and_prepare(file_format=file_format, download_config=config)


def _reason(builder: Any, error: Exception) -> str:
    text = f"{type(error).__name__}: {str(error).strip()}"
    by_hand = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    if by_hand:
        folder = Path(builder._data_dir_root) / "downloads" / "manual"
        return f"must be downloaded by hand ({text[:300]}): {' '.join(by_hand.split())} Put it into {folder}"
    return f"{text[:600]}; see the message and run the command again"
