"""One run, from a recipe to its result, by all processes that a launcher started."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from accelerate.utils import gather_object

from dist_vpt.data.loaders import TrainBatches
from dist_vpt.distributed.collectives import RankAccelerator, on_main_process
from dist_vpt.distributed.devices import select_device
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.rank_status import RankStatus
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.distributed.watchdog import RankWatchdog
from dist_vpt.errors import adding_to_data_errors
from dist_vpt.experiments.acquire import acquire
from dist_vpt.experiments.early_checks import refuse_tries
from dist_vpt.experiments.fitted_run import fit_run
from dist_vpt.files import raising_disk_full, read_json
from dist_vpt.planning.planner import advice_on_memory, check_memory
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect, read_adapters, restore, write_adapters
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import epoch_facts
from dist_vpt.runs.provenance import device_name
from dist_vpt.runs.result import run_result, write_result
from dist_vpt.runs.score_files import write_all_tables
from dist_vpt.runs.scores import main_score, metric_of
from dist_vpt.runtime.peak_memory import MIB, free_and_reset_peak
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import (
    capture_user_error,
    frozen_bytes,
    init_accelerator,
    launcher_notes,
    prepare,
    strategy_name,
)
from dist_vpt.training.averaging import WeightAverage
from dist_vpt.training.checkpointing import States
from dist_vpt.training.components import Components, build_components
from dist_vpt.training.engine import TrainState, fit
from dist_vpt.training.final_scores import FinalScores, score_at_end
from dist_vpt.training.inputs import augmentation_of
from dist_vpt.training.load_backbone import load_backbone
from dist_vpt.training.logger import RunLogger
from dist_vpt.training.metrics import Scores
from dist_vpt.training.optim import check_optimizer


def run(
    recipe: Recipe, status: RankStatus | None = None, on_val: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Do one run or resume it; returns the content of result.json.

    ``status``: of the sweep that it belongs to. ``on_val``: gets the epoch and the main score (%) when val is scored,
    on the main process, and may end the run by raising Pruned.
    """
    launch, status = LaunchEnv.current(), status or RankStatus()
    if recipe.method.fitted:
        return fit_run(recipe, launch, status)
    select_device(recipe.runtime.device, launch)
    folder = RunFolder(str(recipe.run.dir))
    recipe, why = resolve_precision(recipe, folder.precision)

    def make() -> tuple[Components, TrainBatches]:
        refuse_tries(recipe.data)
        check_optimizer(recipe.optim)
        parts = build_components(recipe, launch, defer=launch.deepspeed)
        train = parts.training(launch.rank, launch.world_size)
        parts.method.train()  # a method that cannot be trained raises before anything is written
        if why:
            parts.method.backbone.chosen["precision"] = why
        return parts, train

    free_and_reset_peak()
    made, refused = capture_user_error(launch, make)  # before any process waits for another
    with StopSignal() as stop, ExitStack() as leaving:
        accelerator = init_accelerator(recipe, launch, status, refused, leaving)
        assert made is not None
        parts, train = made
        if acquire(folder, recipe, accelerator, leaving):
            accelerator.print(f"{folder.path}: done already; its scores are in {folder.result}")
            return read_json(folder.result)
        watchdog = RankWatchdog(folder, launch.rank, launch.world_size, recipe.run.timeout_minutes, status)
        with watchdog, advice_on_memory(recipe, accelerator):
            warning = check_memory(recipe, accelerator, len(parts.splits.classes))
            training = _set_up(recipe, parts, train, accelerator, folder, stop)
            leaving.callback(training.close)
            parts.method.backbone.reporters.append(training.warn)
            training.monitor.on_val = on_val
            if warning:
                training.monitor.line(warning)
            fit(training)
            return _conclude(training, parts)


def _set_up(  # noqa: PLR0917 (what a training is made of)
    recipe: Recipe,
    parts: Components,
    train: TrainBatches,
    accelerator: RankAccelerator,
    folder: RunFolder,
    stop: StopSignal,
) -> TrainState:
    """The training, resumed where a state is saved, with its first lines in the log."""
    accelerator.status.set("the start", "setting up")
    total = sum(p.numel() for p in parts.method.parameters())  # counted here: ZeRO-3 shards them below
    trained = sum(p.numel() for _, p in parts.method.trainable())
    load_backbone(accelerator, parts.method)
    parts.init_method(accelerator.device)
    model, optimizer = prepare(recipe.optim, accelerator, parts.method)
    states = States(folder, accelerator)
    average = WeightAverage.of(recipe.train, parts.method)
    progress, resumed = states.resume(parts.method, optimizer, average)
    val = parts.validation(accelerator.process_index, accelerator.num_processes)
    parts.keep_images_on_device(accelerator, train, val)
    stream = parts.use_cached_stream(accelerator, train, val, stop)
    training = TrainState(
        recipe=recipe,
        accelerator=accelerator,
        method=parts.method,
        model=model,
        optimizer=optimizer,
        train=train,
        val=val,
        class_weights=parts.class_weights(accelerator.device),
        guessing=parts.guessing(),
        folder=folder,
        states=states,
        monitor=RunLogger(recipe, accelerator, folder),
        facts={"recipe": recipe.model_dump(mode="json"), "classes": list(parts.splits.classes)},
        progress=progress,
        parameters={"trained": trained, "total": total},
        augmentation=augmentation_of(recipe, parts.method.backbone),
        average=average,
        stop=stop,
    )
    if seeded := parts.seeded():

        def write_splits() -> None:
            folder.write_splits(seeded)

        on_main_process(accelerator, write_splits, "the splits", folder.path, _then(training))
    with raising_disk_full("the log", folder.path, _then(training)):
        headline = [*_headline(training, parts, stream), *resumed]
        training.monitor.start(headline, progress, recipe.train.epochs * train.steps_per_epoch, training.step)
    return training


def _then(t: TrainState) -> str:
    """The hint on how to resume once the disk has space."""
    return f"{t.resume_with} resumes {t.newest_state}"


def _headline(t: TrainState, parts: Components, stream: str) -> list[str]:
    """Log lines that describe the training to come. ``stream``: where the frozen stream comes from."""
    recipe, accelerator = t.recipe, t.accelerator
    trained, total = t.parameters["trained"], t.parameters["total"]
    lines = [
        f"{recipe.backbone_name} + {recipe.method.name}: {trained:,} of {total:,} parameters are trained "
        f"({100 * trained / total:.2f} %)",
        f"{recipe.data.task}: {len(parts.splits[recipe.data.train_on]):,} images of {len(parts.splits.classes)} "
        f"classes at {parts.inputs.sizes}; "
        f"{recipe.train.epochs} epochs of {t.train.steps_per_epoch} steps of {recipe.train.batch_size} images",
        f"{strategy_name(accelerator)} on {accelerator.num_processes} x {accelerator.device.type}, "
        f"{recipe.runtime.precision}; run folder {t.path}",
        "; ".join(f"{name} {choice}" for name, choice in parts.method.backbone.chosen.items()),
        *(f"note: {warning}" for warning in recipe.warnings),
        *launcher_notes(accelerator.launch, recipe),
        *parts.remarks(),
    ]
    if t.average is not None:
        lines.append(
            f"train.model_ema_decay = {recipe.train.model_ema_decay:g}: the moving average of the trained tensors is "
            "what is scored and saved"
        )
    if stream:
        lines.append(stream)
    lines += [f"weights: {note}" for note in parts.load_report.notes]
    if parts.load_report.left_out:
        lines.append(f"left out of the weights' file: {parts.load_report.left_out_summary()}")
    if parts.load_report:
        lines.append(f"weights differ from the backbone (backbone.load=lenient):\n{parts.load_report}")
    return lines


def _conclude(t: TrainState, parts: Components) -> dict[str, Any]:
    """Adapters, the test split (once for the last epoch's weights, once for the best one's), result.json."""
    t.accelerator.status.set("the end", "writing the result")
    if t.average is not None:
        t.average.replace_trained()
    images_per_s = t.monitor.images_per_s(t.progress)
    held, whole = frozen_bytes(t.method)  # between steps
    tensors, skipped = collect(t.method), set(t.progress.skipped) | t.skipped_now()

    def write_tensors() -> None:
        t.states.write_best()
        write_adapters(t.folder.adapters, tensors, t.facts | epoch_facts(t.progress.last))

    on_main_process(t.accelerator, write_tensors, "the results", t.path, _then(t))
    with adding_to_data_errors(f"the training is done and kept in {t.path}: {t.resume_with} scores test alone"):
        last, best, final = _score_tests(t, parts, skipped)
    result = run_result(
        t.recipe,
        last=last,
        best=best,
        seconds=t.seconds,
        images_per_s=images_per_s,
        frozen_weights_mib={"held": round(held / MIB, 2), "whole": round(whole / MIB, 2)},
        parameters=t.parameters,
        skipped=skipped,
        device=device_name(t.accelerator.device),
        processes=t.accelerator.num_processes,
        strategy=strategy_name(t.accelerator),
        runtime=t.method.backbone.chosen,
        protocol=parts.protocol(),
        warnings=t.progress.warnings,
    )

    def finish() -> None:
        t.monitor.flush()
        write_result(t.folder, result)
        t.folder.mark("done")
        t.monitor.line(_summary(result, t))

    on_main_process(t.accelerator, finish, "the results", t.path, _then(t))
    if final is not None:  # last: what fails here must not cost a finished run its result
        _write_tables(t, parts, final)
    t.accelerator.wait_for_everyone()
    return result


def _score_tests(
    t: TrainState, parts: Components, skipped: set[str]
) -> tuple[dict[str, Any], dict[str, Any] | None, FinalScores | None]:
    """The last and the best epoch, with test and extra tests if the recipe wants them; those of the last one in whole.

    Files that cannot be read are added to ``skipped``.
    """
    last, best = dict(t.progress.last), dict(t.progress.best) or None
    if not t.recipe.train.test:
        return last, best, None
    rank, world = t.accelerator.process_index, t.accelerator.num_processes
    with ExitStack() as closing:
        tests = {name: parts.evaluation(name, rank, world) for name in ("test", *parts.splits.extra)}
        for batches in tests.values():
            closing.callback(batches.close)
        final = score_at_end(t.accelerator, t.model, parts.splits, t.val, tests, t.stop, last.get("thresholds"))
        last |= final.scores
        if reason := last.get("temperature", {}).get("reason"):
            t.monitor.line(f"note: no temperature is fitted, and ece_scaled is not defined: {reason}")
        for name, scores in {"test": last["test"], **last.get("extra_tests", {})}.items():
            t.monitor.scores(last["epoch"], t.step, name, scores)
        if best and best["epoch"] == last["epoch"]:
            best |= final.scores
        elif best:
            restore(t.method, read_adapters(t.folder.best)[0], t.folder.best)
            thresholds = best.get("thresholds")
            best |= score_at_end(t.accelerator, t.model, parts.splits, t.val, tests, t.stop, thresholds).scores
        for batches in tests.values():
            skipped |= set(gather_object(sorted(batches.skipped)))
    return last, best, final


def _write_tables(t: TrainState, parts: Components, final: FinalScores) -> None:
    """Tables and figures of what each image and class of test was taken for. A collective call."""
    classes = parts.splits.classes
    if t.accelerator.is_main_process and (line := write_all_tables(t.path, final.predictions, parts.splits)):
        t.monitor.line(line)
    if isinstance(final.test, Scores):
        confusion_KK, view = final.test.confusion().cpu().numpy(), parts.inputs.one_view().transform
        t.monitor.figures(t.step, confusion_KK, final.test.mistakes, parts.splits["test"], view, classes)
    elif final.test is not None:
        t.monitor.class_figure(t.step, final.test.of_classes, classes)


def _summary(result: dict[str, Any], t: TrainState) -> str:
    last, best = result["last"], result["best"]
    parts = [f"done in {result['seconds']:.1f} s ({result['images_per_s']:.0f} images/s)"]
    if "test" in last:
        parts.append(f"test {metric_of(last['test'])} {main_score(last['test']):.2f} % after the last epoch")
    if best and "test" in best:
        parts.append(f"{main_score(best['test']):.2f} % with the best epoch on val ({best['epoch']})")
    if result["skipped_images"]:
        parts.append(f"{len(result['skipped_images'])} unreadable images skipped")
    return "; ".join(parts) + f"\n{t.folder.result}"
