"""What an optimizer needs to step inside DeepSpeed's ZeRO, on one flat part of the tensors of a group at a time."""

from typing import Any

from torch.optim import Optimizer

from dist_vpt.errors import UserError


def fit_into_zero(sharding: Any, own: Optimizer) -> None:
    """Let the optimizer inside DeepSpeed's keep the groups and counts of ``own``, which DeepSpeed was given.

    ``sharding``: DeepSpeed's of ZeRO 1 to 3; of all others nothing is done.

    Raises UserError, on all processes, where DeepSpeed steps several times for a group that counts its steps.
    """
    if isinstance(sharding, Optimizer):
        return
    # DeepSpeed makes Adagrad anew, with one group and one weight decay, since its state is that of its parameters.
    sharding.optimizer.param_groups = own.param_groups
    parts = getattr(sharding, "fp32_partitioned_groups_flat", None)
    if parts is None:  # ZeRO 1 and 2 show the optimizer one group alone
        return
    if _counts_in_groups(own) and len(parts) > len(own.param_groups):
        error = UserError(
            f"DeepSpeed configuration: zero_optimization.sub_group_size = {sharding.sub_group_size}: cuts a group of "
            f"parameters into several, and {type(own).__name__} would count a step for each; use a larger one, or "
            "optim.name=adamw"
        )
        error.shared = True
        raise error
    _count_what_steps(sharding.optimizer)


def _counts_in_groups(optimizer: Optimizer) -> bool:
    return type(optimizer).__name__ == "Adan"


def _count_what_steps(optimizer: Optimizer) -> None:
    """Let a step count for groups with parameters alone: ZeRO-3 empties all groups but the one that it steps."""
    counts: list[Any] = []

    def remember(*_: Any) -> None:
        counts[:] = [group.get("step") for group in optimizer.param_groups]

    def restore(*_: Any) -> None:
        for group, count in zip(optimizer.param_groups, counts, strict=True):
            if not group["params"] and "step" in group:
                group["step"] = count or 0

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)
