"""``accelerate launch -m dist_vpt.train RECIPE... a.b=c``: the entry point of every launcher, without any logic."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from dist_vpt.cli.main import main as run_command

# Nothing heavy is imported here: the data loader's workers import this module again, as their main one.


def main(argv: Sequence[str] | None = None) -> int:
    """``dist-vpt train`` with these arguments; returns the exit code."""
    return run_command(["train", *(sys.argv[1:] if argv is None else argv)])


class _CallableModule(ModuleType):
    """Importing this module binds it to ``dist_vpt.train``, which is to stay the function of that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from dist_vpt.experiments.calls import train

        return train(*args, **kwargs)


if __name__ == "__main__":
    sys.exit(main())
else:
    sys.modules[__name__].__class__ = _CallableModule
