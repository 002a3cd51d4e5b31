"""The report of a sweep: sweep.json, the heat map, and the table on the console."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_vpt.errors import RunFailed
from dist_vpt.experiments.rungs import Rungs, count
from dist_vpt.experiments.search import Search
from dist_vpt.experiments.sweep_grid import setting_text
from dist_vpt.files import to_json, write_atomically
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.search_space import LOG_RATIO
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.provenance import versions
from dist_vpt.runs.results import mean_and_std
from dist_vpt.runs.scores import main_score
from dist_vpt.training.trackers import Trackers

SHOWN_AS = {"top1": "top-1", "mAP": "mAP"}


def conclude(  # noqa: PLR0917 (all that a sweep found)
    folder: RunFolder,
    recipe: Recipe,
    rungs: Rungs | Search,
    results: Sequence[dict[str, Any]],
    seconds: float,
    console: Console | None,
) -> dict[str, Any]:
    """Write sweep.json and the heat map from all outcomes, log them, and print the table. Can be repeated."""
    content = {"metric": recipe.data.metric} | _summary(rungs, results, seconds)
    if recipe.data.draws:
        content["draws"] = recipe.data.model_dump(include={"shots", "fraction", "tries"})
    draw = search_figure if recipe.sweep.search == "optuna" else heatmap_figure
    figure = draw(content["trials"], content["chosen"], SHOWN_AS[recipe.data.metric])
    figure.savefig(folder.path / "heatmap.png", dpi=120)
    write_atomically(folder.path / "sweep.json", to_json(content, indent=1) + "\n")
    _log(folder, recipe, content, figure, console or Console(highlight=False))
    # Of groups that were divided among another number of processes, and of their writes that were killed.
    for left in (*folder.path.glob(".pass-*.pt"), *folder.path.glob("..pass-*.tmp")):
        left.unlink(missing_ok=True)  # where trials are split, the process with the last outcome removes its own
    folder.mark("done")
    if console is not None:
        print_sweep(content, folder.path, console)
    return content


def _log(folder: RunFolder, recipe: Recipe, content: dict[str, Any], figure: Any, console: Console) -> None:
    """Send means, standard deviations and the heat map to the trackers; none that fails costs the sweep."""
    trackers = Trackers(recipe, folder, lambda text: console.print(text, markup=False, soft_wrap=True))
    trackers.kept_in = "sweep.json"
    tests = {"test": content["test"], **content.get("extra_tests", {})}
    values = {
        f"{split}/{name}_{what}": score[what]
        for split, scores in tests.items()
        for name, score in scores.items()
        for what in ("mean", "std")
    }
    trackers.start(settings=content["chosen"], required=False)
    trackers.log(values, 0)
    trackers.picture(f"sweep/val_{recipe.data.metric}", figure, 0)
    trackers.finish()


def _summary(rungs: Rungs | Search, results: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The content of sweep.json. Raises RunFailed where every seed diverged."""
    diverged = {str(r["setting"]["seed"]): r["diverged"] for r in results if r["diverged"]}
    tests = {str(r["setting"]["seed"]): None if r["diverged"] else r["last"]["test"] for r in results}
    scores, chosen = [test for test in tests.values() if test], rungs.chosen()
    if not scores:
        raise RunFailed(
            f"all seeds of the chosen setting diverged ({chosen.label}: {next(iter(diverged.values()))}); "
            "choose another run.dir (of a suite: another --out), and smaller values of sweep.grid.optim.lr or an "
            "optim.clip_norm"
        )
    outcomes = [*(outcome for rung in rungs.done for outcome in rung.outcomes), *results]
    trained = sum(outcome["seconds"] for outcome in outcomes)
    return {
        "chosen": chosen.setting,
        "test": _over_seeds(scores),
        **({"extra_tests": extra} if (extra := _extra_tests(results)) else {}),
        "seeds": tests,
        "diverged_seeds": diverged,
        "rungs": [rung.epochs for rung in rungs.done],
        "trials": _trials(rungs),
        "skipped_images": sorted({file for outcome in outcomes for file in outcome.get("skipped_images", ())}),
        "seconds": {"of this session": round(seconds, 1), "training": round(trained, 1)},
        "versions": versions(),
    }


def _over_seeds(scores: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and spread of each score that is defined for all seeds."""
    defined = [name for name in scores[0] if all(score.get(name) is not None for score in scores)]
    by_score = {name: [score[name] for score in scores] for name in defined}
    return {name: {**mean_and_std(values), "values": values} for name, values in by_score.items()}


def _extra_tests(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same for each extra test that all seeds have; a seed that diverged is left out."""
    found = [result["last"].get("extra_tests") or {} for result in results if not result["diverged"]]
    names = [name for name in found[0] if all(name in one for one in found)]
    return {name: _over_seeds([one[name] for one in found]) for name in names}


def _trials(rungs: Rungs | Search) -> list[dict[str, Any]]:
    """A row for each trial of the grid: last and best epoch are of a whole training alone, and empty without one."""
    rows = {
        job.number: {"number": job.number, "setting": job.setting, "last": {}, "best": None, "diverged": None}
        | {"seconds": 0.0, "rungs": []}
        for job in rungs.grid
    }
    for rung in rungs.done:
        for job, outcome in zip(rung.jobs, rung.outcomes, strict=True):
            row: dict[str, Any] = rows[job.number]
            whole = not outcome["diverged"] and not outcome.get("pruned")
            score = main_score(outcome["last"]["val"]) if whole else None
            row["rungs"].append({"epochs": job.recipe.train.epochs, job.recipe.data.metric: score})
            row |= {"diverged": outcome["diverged"], "seconds": round(row["seconds"] + outcome["seconds"], 3)}
            row |= {"pruned": outcome["pruned"]} if "pruned" in outcome else {}
            if rung is rungs.done[-1]:
                row |= {"last": outcome["last"], "best": outcome["best"]}
    return list(rows.values())


def heatmap_figure(trials: Sequence[dict[str, Any]], chosen: dict[str, Any], score_name: str = "top-1") -> Any:
    """The score that decides on val over the grid's first two keys that vary; over further keys, the best of each cell.

    ``trials``: those of sweep.json; ``chosen``: its setting. A cell without a whole training says how long one was.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    settings = [trial["setting"] for trial in trials]
    keys = [key for key in chosen if len({repr(setting[key]) for setting in settings}) > 1]
    keys = (keys + [key for key in chosen if key not in keys])[:2]
    values = [list(dict.fromkeys(setting[key] for setting in settings)) for key in keys]
    values += [[None]] * (2 - len(keys))
    rows, columns = values
    best: dict[tuple[int, int], float | None] = {}
    instead: dict[tuple[int, int], str] = {}
    for trial in trials:
        cell = [axis.index(trial["setting"][key]) for key, axis in zip(keys, values, strict=False)] + [0, 0]
        at = cell[0], cell[1]
        whole = trial["last"] and not trial["diverged"]
        score = main_score(trial["last"]["val"]) if whole else None
        best[at] = max((v for v in (best.get(at), score) if v is not None), default=None)
        if not trial["diverged"]:
            instead[at] = count(trial["rungs"][-1]["epochs"], "epoch")
        if trial["setting"] == chosen:
            marked = at
    figure = Figure(figsize=(2.2 + 1.1 * len(columns), 1.8 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shown = [[best.get((r, c)) for c in range(len(columns))] for r in range(len(rows))]
    numbers = [[float("nan") if v is None else v for v in row] for row in shown]
    image = axes.imshow(numbers, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axes, label=f"val {score_name}, last epoch (%)")
    axes.set_xticks(range(len(columns)), map(_short, columns))
    axes.set_yticks(range(len(rows)), map(_short, rows))
    axes.set(ylabel=keys[0], xlabel=keys[1] if len(keys) > 1 else "", title="Trials (chosen one framed)")
    low, high = image.get_clim()
    for r, row in enumerate(shown):
        for c, value in enumerate(row):
            text = instead.get((r, c), "diverged") if value is None else f"{value:.1f}"
            color = "gray" if value is None else "white" if value < (low + high) / 2 else "black"
            axes.text(c, r, text, ha="center", va="center", color=color, fontsize=9)
    axes.add_patch(Rectangle((marked[1] - 0.5, marked[0] - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    return figure


def search_figure(trials: Sequence[dict[str, Any]], chosen: dict[str, Any], score: str) -> Any:
    """The ``score`` on val of each trial by each drawn key; pruned and diverged ones are gray, at the bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 + 3.2 * len(chosen), 3.4), layout="constrained")
    whole = [trial for trial in trials if trial["last"]]
    bottom = min(main_score(trial["last"]["val"]) for trial in whole)
    for axes, key in zip(figure.subplots(1, len(chosen), squeeze=False, sharey=True)[0], chosen, strict=True):
        values = [trial["setting"][key] for trial in trials]
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        for trial, value in zip(trials, values, strict=True):
            value_on_val = main_score(trial["last"]["val"]) if trial["last"] else bottom
            color = "red" if trial["setting"] == chosen else "tab:blue" if trial["last"] else "lightgray"
            axes.scatter([value if numbers else str(value)], [value_on_val], color=color)
        if numbers and min(values) > 0 and max(values) >= LOG_RATIO * min(values):
            axes.set_xscale("log")
        axes.set(xlabel=key)
    figure.axes[0].set(ylabel=f"val {score}, last epoch (%)")
    figure.suptitle("Trials (chosen one red; pruned and diverged ones gray)")
    return figure


def print_sweep(content: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the table of a sweep, from its sweep.json."""
    metric = content.get("metric", "top1")
    table = Table(title=f"{folder}: trials, trained on train and scored on val ({SHOWN_AS[metric]}, %)")
    keys = list(content["chosen"])
    short = content.get("rungs", [])[:-1]  # epochs of the rungs before the last
    for key in keys:
        table.add_column(key.removeprefix("optim."), justify="right", no_wrap=True)
    rungs = [count(epochs, "epoch") for epochs in short]
    for column in (*rungs, "last epoch", "best epoch", "at epoch", "chosen"):
        table.add_column(column, justify="right")
    for trial in content["trials"]:
        cells = [_short(trial["setting"][key]) for key in keys]
        cells += ["diverged" if rung[metric] is None else f"{rung[metric]:.2f}" for rung in trial.get("rungs", [])]
        cells = cells[: len(keys) + len(short)]
        whole = len(trial.get("rungs", [])) > len(short) or not short
        if whole and (trial["diverged"] or trial.get("pruned")):
            cells.append("diverged" if trial["diverged"] else "pruned")
        elif whole:
            last, best = trial["last"]["val"][metric], trial["best"]
            mark = "*" if trial["setting"] == content["chosen"] else ""
            cells += [f"{last:.2f}", f"{best['val'][metric]:.2f}", str(best["epoch"]), mark]
        table.add_row(*cells)
    console.print(table)
    score = content["test"].get(metric)
    if score:
        console.print(
            f"test {metric} {score['mean']:.2f} ± {score['std']:.2f} % over {len(score['values'])} {_over(content)} "
            f"({setting_text(content['chosen'])})",
            markup=False,
        )
    for name, score in content.get("extra_tests", {}).items():
        if mean := score.get("top1"):
            console.print(f"{name} top1 {mean['mean']:.2f} ± {mean['std']:.2f} %", markup=False)
    for seed, reason in content["diverged_seeds"].items():
        console.print(f"left out of that mean: seed {seed} diverged ({reason})", markup=False, soft_wrap=True)
    if skipped := content.get("skipped_images"):
        console.print(f"without {len(skipped)} images that cannot be read: the file below lists them")
    console.print(str(folder / "sweep.json"), markup=False, soft_wrap=True)


def _over(content: dict[str, Any]) -> str:
    """What the mean on test is over."""
    draws, plural = content.get("draws"), len(content["seeds"]) > len(content["diverged_seeds"]) + 1
    if draws is None:
        return "seeds on trainval" if plural else "seed on trainval"
    what = ("tries" if plural else "try") if draws["tries"] > 1 else "seeds" if plural else "seed"
    if draws["shots"] is None:
        return f"{what} with {draws['fraction']:g} of train, on trainval"
    return f"{what} of {draws['shots']} shots, on train"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
