"""One run of a method that is fitted to all features at once: a sweep's trial, alone, in a run folder."""

from contextlib import ExitStack
from typing import Any

from dist_vpt.distributed.collectives import RankAccelerator, on_main_process
from dist_vpt.distributed.devices import select_device
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.rank_status import RankStatus
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.distributed.watchdog import RankWatchdog
from dist_vpt.errors import UserError
from dist_vpt.experiments.acquire import acquire
from dist_vpt.experiments.early_checks import refuse_tries
from dist_vpt.experiments.trial_run import write_run
from dist_vpt.files import read_json
from dist_vpt.planning.planner import advice_on_memory, check_memory
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import capture_user_error, init_accelerator, launcher_notes
from dist_vpt.training.build_trials import build_trial_group
from dist_vpt.training.components import build_components
from dist_vpt.training.final_scores import FinalScores, score_trials_at_end
from dist_vpt.training.trials import fit_trials


def fit_run(recipe: Recipe, launch: LaunchEnv, status: RankStatus) -> dict[str, Any]:
    """Do one run; returns the content of result.json. All processes share the images, and fit to all of them.

    There is no state to resume: what was stopped is done again, in the time that its features take.
    """
    select_device(recipe.runtime.device, launch)
    folder = RunFolder(str(recipe.run.dir))
    recipe, why = resolve_precision(recipe, folder.precision)

    def check() -> list[str]:
        if launch.deepspeed:
            raise UserError(
                f"method.name = {recipe.method.name}: is fitted, and has nothing for DeepSpeed to optimize or shard; "
                "start it with the ddp strategy"
            )
        refuse_tries(recipe.data)
        parts = build_components(recipe, launch)
        return parts.remarks()

    remarks, refused = capture_user_error(launch, check)  # before any process waits for another
    with StopSignal() as stop, ExitStack() as leaving:
        accelerator = init_accelerator(recipe, launch, status, refused, leaving)
        if acquire(folder, recipe, accelerator, leaving):
            accelerator.print(f"{folder.path}: done already; its scores are in {folder.result}")
            return read_json(folder.result)
        leaving.enter_context(RankWatchdog(folder, launch.rank, launch.world_size, recipe.run.timeout_minutes, status))
        notes = [f"note: {warning}" for warning in recipe.warnings] + launcher_notes(launch, recipe)
        for line in (*notes, *([f"precision {why}"] if why else []), *(remarks or [])):
            accelerator.print(line)
        return _fit(recipe, folder, accelerator, stop)


def _fit(recipe: Recipe, folder: RunFolder, accelerator: RankAccelerator, stop: StopSignal) -> dict[str, Any]:
    def show(line: str) -> None:
        if line:
            accelerator.print(line)

    with advice_on_memory(recipe, accelerator):
        group = build_trial_group([recipe], accelerator, stop, folder.state, show, check_memory=check_memory)
        try:
            fit_trials(group)
            finals = score_trials_at_end(group, group.trials) if recipe.train.test else [FinalScores()]
        finally:
            group.close()
    [trial], skipped = group.trials, sorted(group.skipped)

    def write() -> None:
        show(write_run(recipe, trial, group.parts, accelerator, group.seconds, skipped, finals[0].predictions))

    on_main_process(accelerator, write, "the results", folder.path, "the same command with run.resume=auto fits again")
    last = trial.progress.last
    for name, scored in {**last, **last.get("extra_tests", {})}.items():
        if isinstance(scored, dict) and "top1" in scored:
            show(f"{name:5} top1 {scored['top1']:.2f} %  loss {scored['loss']:.4f}")
    show(f"done in {group.seconds:.1f} s\n{folder.result}")
    accelerator.wait_for_everyone()
    return read_json(folder.result)
