"""``accelerate launch -m dist_vpt.train RECIPE... a.b=c``: the entry point of every launcher, without any logic."""

import sys

from dist_vpt.cli.main import run_with_exit_code

# Nothing heavy up here: the workers that load images import this module again, as their main one.


def main(argv: list[str] | None = None) -> int:
    """Train as the recipe says; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_with_exit_code(lambda: _train([word for word in argv if word != "--debug"]), debug="--debug" in argv)


def _train(argv: list[str]) -> None:
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    recipe = load_recipe(*split_arguments(argv))  # before torch is imported: mistakes show at once
    from dist_vpt.experiments.run import run

    run(recipe)


if __name__ == "__main__":
    sys.exit(main())
