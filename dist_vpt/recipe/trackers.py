"""Where curves can be sent: the trackers that Accelerate knows, and the packages that they need."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

from dist_vpt.errors import UserError

# By the names of accelerate.utils.LoggerType.
TrackerName = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
TRACKERS: tuple[str, ...] = get_args(TrackerName)
INSTALLED_BY = {"wandb": "'dist-vpt[wandb]'", "mlflow": "'dist-vpt[mlflow]'", "comet_ml": "comet-ml"}


def require_trackers(names: Sequence[str]) -> None:
    """Raise UserError where the packages of trackers are not installed; imports none of them."""
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        packages = " ".join(INSTALLED_BY.get(name, name) for name in missing)
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"run.trackers: {' and '.join(missing)} {are} not installed; pip install {packages}, or leave "
            f"{'it' if len(missing) == 1 else 'them'} out"
        )


def _is_installed(name: str) -> bool:
    found = find_spec(name)
    return found is not None and found.origin is not None  # a folder of this name, as wandb writes, is no package
