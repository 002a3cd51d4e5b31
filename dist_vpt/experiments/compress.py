"""``dist-vpt compress``: a VQT run's head on fewer of its features (``fixed_features.py``).

- ``compress``: a fresh head on all features, its loss raised by a group lasso, c * sum over f of ||W[:, f]||_2. The
  norms are the features' scores; the head itself is then cut to the best ones.
- ``featselect``: a fresh head on the best features alone.
- ``finetune``: from there on head and queries together, on the frozen stream.

What becomes smaller is the head, and nothing else: all queries are kept and computed, since a block's features are
scaled to length 1 together. With K classes a kept feature takes 4 K bytes in the adapter file and 8 more for its
number.

    RUN/compressed/MODE-KEEP/        one fraction: a run folder, as `train` writes it
    RUN/compressed/MODE-curve.*      accuracy against the fraction kept (json, png)
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import UserError
from dist_vpt.experiments.compress_fractions import is_done, make_fraction, parse_shares, remove_finished_states
from dist_vpt.experiments.compress_report import conclude
from dist_vpt.experiments.compress_training import Mode, describe_source, train_fractions, write_run
from dist_vpt.experiments.fixed_features import Source, fix_features
from dist_vpt.files import raising_disk_full
from dist_vpt.inference.hub import adapters_file, is_hub_id, open_run
from dist_vpt.methods.config_readers import VQTConfig
from dist_vpt.methods.vqt import VQT
from dist_vpt.recipe.sharing import require_dataset, with_weights
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.runs.folder import RESUME_HINT
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import leave_accelerate_as_it_is, make_accelerator
from dist_vpt.training.components import Components, build_components


def compress(  # noqa: PLR0917 (the options of the command)
    run: str,
    keep: Sequence[str | float],
    mode: Mode = "featselect",
    adapters: str = "last",
    lasso: float = 1e-4,
    out: str | None = None,
    overrides: Sequence[str] = (),
    weights: str | None = None,
) -> dict[str, Any]:
    """Compress a run to each fraction of ``keep`` that is not done yet; returns the content of MODE-curve.json.

    ``run``: its folder, or ``hub:user/name``, whose smaller runs are written to ``compressed/`` here unless ``out``
    names a folder. ``weights``: the file of the backbone's weights, where they are not where the recipe has them.

    Raises UserError for a run that is not VQT's, for adapters, data or fractions that do not fit, and where a folder
    holds another compression; RunFailed for a loss that is not finite and for a full disk; Interrupted after SIGTERM or
    SIGUSR1.
    """
    shares, console = parse_shares(keep), Console(highlight=False)
    if not 0 <= lasso < math.inf:
        raise UserError(f"--lasso {lasso}: must be a number from 0 on; the published one is 1e-4")
    launch = LaunchEnv.current()
    if launch.world_size > 1:
        raise UserError("compress: works on one process; start it without accelerate launch")
    source, parts, method = open_source(run, adapters, overrides, weights)
    folder = _output_folder(run, out)
    made_of = {"mode": mode, "lasso": lasso, "sha256": hashlib.sha256(source.adapters.read_bytes()).hexdigest()}
    fraction_of = partial(make_fraction, source.recipe, method.all_features, folder, made_of)
    fractions = [fraction_of(share) for share in shares]
    pending = [fraction for fraction in fractions if not is_done(fraction)]
    if pending:
        show = partial(console.print, markup=False, soft_wrap=True)
        with StopSignal() as stop, ExitStack() as stack:
            leave_accelerate_as_it_is(stack)
            accelerator = make_accelerator(source.recipe, launch)
            stack.callback(accelerator.end_training)
            for fraction in pending:
                stack.enter_context(fraction.folder.acquire(fraction.recipe))
            features = fix_features(source, parts, method, accelerator, stop)
            about = describe_source(features, accelerator)
            show(f"{method.all_features:,} features of each image, from fixed queries")
            if (augment := parts.transform.augment) != "none":
                show(f"heads are trained on images without data.augment = {augment}, as evaluation shows them")
            made = train_fractions(mode, pending, fraction_of, features, about, lasso, accelerator, stop, show)
            del features, parts, method  # `finetune` drops them, too, before it makes a backbone of its own
            waiting = {fraction.keep for fraction in pending}
            for fraction, trained in made:  # each is written before the next one is begun
                if fraction.keep in waiting:
                    with raising_disk_full("the results", fraction.folder.path, RESUME_HINT):
                        write_run(fraction, trained, about)
    if mode == "finetune":
        remove_finished_states(fractions[0], fraction_of)
    with raising_disk_full("the curve", folder, RESUME_HINT):
        return conclude(folder, fractions, fraction_of, console)


def _output_folder(run: str, out: str | None) -> Path:
    default = Path("compressed") if is_hub_id(run) else Path(run) / "compressed"
    folder = Path(out) if out is not None else default
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {folder}: {existing} is a file; name a folder")
    return folder


def open_source(
    run: str, adapters: str, overrides: Sequence[str], weights: str | None = None
) -> tuple[Source, Components, VQT]:
    """A VQT run with its adapters loaded. Raises UserError where it is none, or is not of this data."""
    folder = open_run(run)
    recipe = with_weights(folder.load(overrides), weights, run)
    recipe, _ = resolve_precision(recipe)
    if folder.load().method.name != "vqt" or not isinstance(recipe.method, VQTConfig):
        name = folder.load().method.name
        raise UserError(
            f"{run}: method.name = {name}: only a vqt run has features to choose among; name one, and do not override "
            "its method"
        )
    if recipe.method.keep is not None:
        raise UserError(
            f"{run}: method.keep = {recipe.method.keep}: is compressed already; name the run that it was made from"
        )
    if recipe.data.labels == "multiple":
        raise UserError(
            f"{run}: data.labels = multiple: heads are compressed for one label an image; keep the run as it is, or "
            "train a smaller one (method.queries)"
        )
    require_dataset(recipe, run)
    path = adapters_file(folder, adapters)
    tensors, facts = read_adapters(path)
    parts = build_components(recipe)
    assert isinstance(parts.method, VQT)
    if list(parts.splits.classes) != facts.get("classes"):
        raise UserError(
            f"{run}: was trained on other classes than {recipe.data.task} has here; set data.root to the run's data"
        )
    restore(parts.method, tensors, path)
    scored = "test" if recipe.train.test else "val"
    if scored == "val" and recipe.data.train_on != "train":
        raise UserError(
            "train.test = false: with data.train_on = trainval nothing is left to score; set train.test=true"
        )
    parts.splits[scored]  # raises DataError now where it is missing
    return Source(recipe, path, tensors, parts.splits.classes, scored), parts, parts.method
