"""The lock on a run folder, by all processes that a launcher started."""

from contextlib import ExitStack

from accelerate.utils import broadcast_object_list

from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank
from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder


def acquire(
    folder: RunFolder, recipe: Recipe, accelerator: RankAccelerator, leaving: ExitStack, kind: str = "run"
) -> bool:
    """Let the main process lock the folder for a run or sweep; returns whether that is done already.

    Raises its error on all processes, and RunFolderError where one of them does not see the folder.
    """
    done: bool = False
    refused: UserError | None = None
    if accelerator.is_main_process:
        try:
            done = leaving.enter_context(folder.acquire(recipe, kind))
        except UserError as error:
            refused = error
    raise_on_any_rank(accelerator, refused)
    if not folder.seen():
        refused = RunFolderError(
            f"{folder.path}: no run is seen here, where process 0 has just begun one; every process "
            "needs to see the run folder: choose a run.dir that all nodes share"
        )
    raise_on_any_rank(accelerator, refused)
    return broadcast_object_list([done])[0]
