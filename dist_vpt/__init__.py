"""dist_vpt: tune frozen vision transformers across many GPUs, and pay only for what you tune.

The names of ``__all__`` are the public Python API. Each is imported when it is first used: importing the package takes
no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_vpt.errors import Interrupted, UserError
    from dist_vpt.experiments.calls import Run, Sweep, load_recipe, sweep, train
    from dist_vpt.inference.export_call import export
    from dist_vpt.inference.push import push
    from dist_vpt.inference.saved import load
    from dist_vpt.inference.tuned import Tuned
    from dist_vpt.recipe.schema import Recipe
    from dist_vpt.training.own_loop import attach

__version__ = "0.1.0"

# Public name -> the module that has it.
_MODULES = {
    "Interrupted": "errors",
    "Recipe": "recipe.schema",
    "Run": "experiments.calls",
    "Sweep": "experiments.calls",
    "Tuned": "inference.tuned",
    "UserError": "errors",
    "attach": "training.own_loop",
    "export": "inference.export_call",
    "load": "inference.saved",
    "load_recipe": "experiments.calls",
    "push": "inference.push",
    "sweep": "experiments.calls",
    "train": "experiments.calls",
}
__all__ = [
    "Interrupted", "Recipe", "Run", "Sweep", "Tuned", "UserError", "__version__", "attach", "export",
    "load", "load_recipe", "push", "sweep", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dist_vpt.distributed.caches import move_unwritable_caches
    from dist_vpt.distributed.rank_log import quiet_libraries

    move_unwritable_caches()  # before a library reads its variable
    quiet_libraries()
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
