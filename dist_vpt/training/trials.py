"""Many trials of a reader in one pass over the frozen stream, each what it would be alone.

B images of a micro-batch, K classes, T trials.

A trial has a recipe, an initialization, a learning rate and decay, clipping, in fp16 a gradient scale, and an end to
itself; the data order, the stream and the loop are shared. The loss is the sum of the trials' losses, so that each
one's gradient is exactly its own. Trials of equal shapes are computed and updated as one model (trial_stack.py).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor

from dist_vpt.data.joined import Joined
from dist_vpt.data.loaders import Batch, EvalBatches
from dist_vpt.distributed.collectives import all_reduce_sum, raise_on_any_rank, stop_all_ranks
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.base import Reader
from dist_vpt.methods.stack import ReaderStack, Sources, by_shape
from dist_vpt.runs.adapters import collect
from dist_vpt.runs.scores import main_score
from dist_vpt.training.agreement import next_or_error
from dist_vpt.training.components import Components
from dist_vpt.training.engine import Training, fit
from dist_vpt.training.metrics import no_readable_image
from dist_vpt.training.multi_label import AnyScores, scores_of
from dist_vpt.training.step import image_losses, not_finite, right_answers, weigh_global_batch
from dist_vpt.training.step_graph import StepGraph, recorder_of
from dist_vpt.training.trial_stack import TrialStack, stack_running
from dist_vpt.training.trial_state import Trial, write_trials
from dist_vpt.training.unread import HostCopy

SAVE_SECONDS = 30.0  # at least so long between states saved at the ends of epochs


@dataclass(frozen=True)
class UnreadTrials:
    """A step of trials that has been issued."""

    step: int  # over the whole training, from 0
    trials: list[Trial]  # whose step it was
    numbers: HostCopy  # gradient norm of each, loss of each, correct answers of each; images, and their weight
    scales: bool  # gradients, as in fp16
    late: bool  # the numbers end with FLAGS


class StepInputs(NamedTuple):
    """All in which one step of trials differs from the next, on the device, but for random numbers."""

    batches: list[Batch]
    weights: list[Tensor]  # of each image of each batch in the loss, [B]
    weight: Tensor  # of the global batch, []
    factor: Tensor  # of the peak learning rates, []


class QuickScores(NamedTuple):
    """What an epoch of a trial scores on val."""

    scores: dict[str, float]
    thresholds: Sequence[float] = ()  # where images have several labels


@dataclass(kw_only=True)
class TrialGroup(Training):
    """Trials that are trained together, and what they share; its recipe is the first one's.

    All have it in common but for PER_TRIAL_KEYS.
    """

    trials: list[Trial]
    parts: Components
    state: Path  # file of the group's state until it has ended
    show: Callable[[str], None]
    keeps_best: bool = False
    stacks: list[TrialStack] = field(default_factory=list)  # of the running trials, made by the first step
    graph: StepGraph | None = None  # made by the first step
    skipped: set[str] = field(default_factory=set)  # files that no process could read
    saved_at: float = field(default_factory=time.monotonic)
    resume_with = "the same command"

    @property
    def running(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.running]

    @property
    def ended(self) -> bool:
        return not self.running

    def restack(self) -> list[TrialStack]:
        """The stacks of the running trials, made anew where one of them has ended."""
        if not self.stacks or not all(trial.running for stack in self.stacks for trial in stack.trials):
            self.stacks = []  # whose tensors are freed while the new ones are made
            if self.graph is not None:
                self.graph.forget()
            self.stacks = stack_running(self.trials)
        return self.stacks

    @property
    def path(self) -> Path:
        return self.state

    @property
    def state_folder(self) -> Path:
        return self.state.parent

    @property
    def newest_state(self) -> str:
        return "from the state before" if self.state.is_file() else "from the beginning of these trials"

    def start_epoch(self) -> None:
        for trial in self.trials:
            trial.reader.train()

    def take_step(self, fetched: list[Batch] | UserError) -> None:
        step_trials(self, fetched)
        self.progress.step += 1

    def count_step(self, unread: UnreadTrials) -> None:
        """Read a step, count it in each trial that has not diverged, and report the progress (``dist-vpt status``)."""
        with self.accelerator.status.in_collective() if unread.late else nullcontext():
            numbers = unread.numbers.read()
        if unread.late:
            *numbers, failed, stopped = numbers
            self.agreement.reached(self.accelerator, self.stop, failed, stopped)
        *found, images, weight = numbers
        for t, trial in enumerate(unread.trials):
            norm, loss, correct = found[t :: len(unread.trials)]
            _check_finite(trial, "loss", loss, unread.step)
            if not unread.scales:  # a gradient scale answers an overflow by a skipped step and a smaller scale
                _check_finite(trial, "gradient norm", norm, unread.step)
            if trial.running:
                trial.progress.count(loss / weight, correct, images)
        self._report_progress(unread.step + 1)

    def _report_progress(self, done: int) -> None:
        """``done``: steps that have been read."""
        epochs = self.recipe.train.epochs
        steps = epochs * self.train.steps_per_epoch
        self.accelerator.status.progress = {
            "step": done,
            "steps": steps,
            "epoch": self.epoch + 1,
            "epochs": epochs,
            "trials": len(self.trials),
            "seconds": round(self.seconds, 3),
            "seconds_left": round(self.seconds / done * (steps - done), 3),
            "images_per_s": round(max(trial.progress.images for trial in self.trials) / max(self.seconds, 1e-6), 2),
        }

    def end_epoch(self) -> None:
        """Scores of the epoch, best epochs and early stopping."""
        train, ended, done = self.recipe.train, self.running, self.epoch + 1
        found: list[QuickScores] = []
        if self.val is not None and ended and (done == train.epochs or done % train.eval_every == 0):
            self.accelerator.status.set(f"epoch {done}", "scoring val")
            found = quick_scores(self, ended, self.val)  # before the epoch ends: after a stop it is scored again
        self.progress.epoch, self.progress.step = done, 0
        for trial in ended:
            self.learning_warning(trial.recipe, trial.progress, trial.progress.end_epoch(self.recipe.data.step_score))
        if not found:
            return
        for trial, (scores, thresholds) in zip(ended, found, strict=True):
            _check_finite(trial, "loss on val", scores["loss"], self.step)
            if trial.running and trial.progress.scored(scores, train.early_stop, thresholds) and self.keeps_best:
                trial.best = collect(trial.reader)
        values = [main_score(trial.progress.last["val"]) for trial in ended if not trial.diverged]
        shown = f"{min(values):.2f} to {max(values):.2f} %" if values else "all diverged"
        self.show(f"epoch {done}/{train.epochs}  val {self.recipe.data.metric} of {len(values)} trials: {shown}")

    def save_is_due(self) -> bool:
        """Process 0 decides for all: other clocks differ. A collective call."""
        due = self.accelerator.is_main_process and time.monotonic() - self.saved_at > SAVE_SECONDS
        self.saved_at = time.monotonic() if due else self.saved_at
        return all_reduce_sum(self.accelerator, due)[0] > 0

    def write_state(self) -> str | None:
        failed = None
        self.skipped |= self.skipped_now()
        if self.accelerator.is_main_process:
            shared = {"epoch": self.epoch, "step": self.progress.step, "seconds": self.seconds}
            try:
                write_trials(self.state, self.trials, {**shared, "skipped": sorted(self.skipped)})
            except OSError as error:
                failed = str(error)
        return broadcast_object_list([failed])[0]

    def warn(self, text: str) -> None:
        self.show(text)


def fit_trials(group: TrialGroup) -> None:
    """Train to the end; each trial is scored on val (if there is one) after the epochs that the recipe says.

    Raises Interrupted, with the state saved, after SIGTERM or SIGUSR1, and RunFailed where the disk stays full.
    """
    group.saved_at = time.monotonic()
    fit(group)
    group.accelerator.status.progress = {}


def step_trials(group: TrialGroup, fetched: list[Batch] | UserError) -> None:
    """Issue one optimizer step of every running trial on one global batch. A collective call."""
    stacks = group.restack()
    micro_batches, weight = weigh_global_batch(
        group.accelerator, fetched, group.class_weights, group.stop, agreement=group.agreement
    )
    group.accelerator.status.set(f"step {group.step}", "training", limited=True)
    batches, weights = [batch for batch, _ in micro_batches], [weights_B for _, weights_B in micro_batches]
    inputs = StepInputs(batches, weights, weight, stacks[0].rate_factor(group.step, group.train.steps_per_epoch))
    rank = group.accelerator.process_index
    sources = [[stack.seeded(group.step, rank, micro) for stack in stacks] for micro in range(len(batches))]
    used = [source.generator for of_stacks in sources for own in of_stacks for source in own or ()]
    graph = group.graph = group.graph or _graph_of(group, batches[0])
    numbers, flags = graph(partial(compute_step, group, sources), inputs, used), group.agreement.flags
    copy = HostCopy(numbers if flags is None else torch.cat([numbers, flags]))
    running = [trial for stack in stacks for trial in stack.trials]
    group.unread.append(UnreadTrials(group.step, running, copy, scales=stacks[0].scales, late=flags is not None))


def compute_step(group: TrialGroup, all_sources: Sequence[Sequence[Sources]], inputs: StepInputs) -> Tensor:
    """The gradient norms of all running trials, their losses and correct answers, the images, and the batch's weight.

    It may be captured in a CUDA graph: nothing here depends on a step but what is in ``inputs`` and random numbers.
    """
    accelerator, stacks, smoothing = group.accelerator, group.stacks, group.recipe.train.label_smoothing
    running, weight = [trial for stack in stacks for trial in stack.trials], inputs.weight
    for stack in stacks:
        stack.forget_gradients()  # of a step that was not ended
    sums = torch.zeros(2 * len(running) + 1, device=accelerator.device)  # loss, correct answers; images
    for batch, weights_B, sources in zip(inputs.batches, inputs.weights, all_sources, strict=True):
        readers = [stack.readers for stack in stacks]
        logits_TBK = torch.cat(type(running[0].reader).read_stacks(readers, observed_stream(group, batch), sources))
        losses_TB = image_losses(logits_TBK, batch["labels"], smoothing, group.class_weights)
        losses_T = (losses_TB * weights_B).sum(1)
        correct_T = (right_answers(logits_TBK, batch["labels"]) * batch["weight"]).sum(1)
        sums += torch.cat([losses_T.detach(), correct_T, batch["weight"].sum()[None]])
        losses_T = _penalized(readers, losses_T, weight / (accelerator.num_processes * len(inputs.batches)))
        if stacks[0].scale_T is not None:
            losses_T = losses_T * torch.cat([stack.scale_T for stack in stacks])  # type: ignore[misc]
        # One that is not finite stays in its own trial, whose gradient is not used.
        (losses_T.sum() / weight).backward()
    sums = _sum_over_processes(group, sums)
    finite = sums[: len(running)].isfinite().split([len(stack.trials) for stack in stacks])
    norms = [stack.update(inputs.factor, own) for stack, own in zip(stacks, finite, strict=True)]
    return torch.cat([*norms, sums, weight[None]])


def _graph_of(group: TrialGroup, batch: Batch) -> StepGraph:
    """What issues the group's steps, on CUDA as one launch where it can."""
    chosen = group.trials[0].reader.backbone.chosen

    def report(reason: str) -> None:
        chosen["training step"] = "captured in a CUDA graph" if not reason else f"not in a CUDA graph: {reason}"
        if reason:
            group.show(f"the training step is not captured in a CUDA graph: {reason}")

    recorder = recorder_of(group.accelerator.device)
    reason = _not_captured_reason(group, batch) if recorder is not None else ""
    return StepGraph(None if reason else recorder, report, reason)


def _not_captured_reason(group: TrialGroup, batch: Batch) -> str:
    """Why the steps cannot be replayed, or ""."""
    if group.accelerator.num_processes > 1:
        return f"{group.accelerator.num_processes} processes share each batch"
    if not _is_cached(batch["images"]):
        return "the frozen stream is computed anew for each batch"
    if any(trial.draws for trial in group.trials) and type(group.trials[0].reader).one_by_one():
        return f"dropout of {group.recipe.method.name} draws from torch's default random numbers"
    return ""


def _is_cached(images: Any) -> bool:
    parts = images.parts if isinstance(images, Joined) else (images,)
    return all(isinstance(part, StreamOutput) for part in parts)


def score_trials(
    group: TrialGroup, trials: Sequence[Trial], split: str, options: Sequence[Mapping[str, Any]] = ()
) -> list[AnyScores]:
    """Stream a split once through the backbone and score it with all trials. A collective call.

    ``options``: those of each trial, as of ``scores_of``.
    """
    group.accelerator.status.set("the end", f"scoring {split}")
    batches = group.parts.evaluation(split, group.accelerator.process_index, group.accelerator.num_processes)
    group.parts.use_stream_files(group.accelerator, batches, group.stop)
    try:
        scores = score_batches(group, trials, batches, options)
    finally:
        batches.close()
    group.skipped |= set(gather_object(sorted(batches.skipped)))
    return scores


@torch.no_grad()
def score_batches(
    group: TrialGroup, trials: Sequence[Trial], batches: EvalBatches, options: Sequence[Mapping[str, Any]] = ()
) -> list[AnyScores]:
    """All scores of a split, for each trial; ``options``: those of each trial's Scores. A collective call."""
    classes, device = len(group.parts.splits.classes), group.accelerator.device
    scores = [scores_of(batches, classes, device, **each) for each in options or [{}] * len(trials)]
    for batch, logits in _read_split(group, trials, batches):
        for score, logits_BK in zip(scores, logits, strict=True):
            score.update(logits_BK, batch["labels"], batch["weight"], batch["index"])
    return scores


def read(stacks: Sequence[ReaderStack], observed: StreamOutput) -> list[Tensor]:
    """Logits [B, K] of each reader, stack by stack."""
    logits = type(cast(Reader, stacks[0].readers[0])).read_stacks(stacks, observed, [None] * len(stacks))
    return [logits_BK for logits_TBK in logits for logits_BK in logits_TBK]


def _penalized(stacks: Sequence[ReaderStack], losses_T: Tensor, weight: Tensor) -> Tensor:
    """Losses of all trials, each with its penalty times ``weight``."""
    found = [type(cast(Reader, stack.readers[0])).penalties(stack) for stack in stacks]
    if all(penalties_T is None for penalties_T in found):
        return losses_T
    none = [losses_T.new_zeros(len(stack.readers)) for stack in stacks]
    return losses_T + weight * torch.cat([none[n] if each is None else each for n, each in enumerate(found)])


def _stacked_readers(group: TrialGroup, trials: Sequence[Trial]) -> tuple[list[ReaderStack], list[int]]:
    """Stacks with the readers of these trials, those of the training if possible; for each trial its place in them."""
    readers, stacks = [trial.reader for trial in trials], [stack.readers for stack in group.stacks]
    if {id(reader) for stack in stacks for reader in stack.readers} != {id(reader) for reader in readers}:
        stacks = [ReaderStack.of([readers[n] for n in numbers]) for numbers in by_shape(readers)]
    places = {id(reader): n for n, reader in enumerate(reader for stack in stacks for reader in stack.readers)}
    return stacks, [places[id(reader)] for reader in readers]


def observed_stream(group: TrialGroup, batch: Batch) -> StreamOutput:
    """The frozen stream of a batch, which a cache has in place of its images."""
    return group.trials[0].reader.stream(batch["images"])


def _read_split(
    group: TrialGroup, trials: Sequence[Trial], batches: EvalBatches
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Each batch of a split with the logits of every trial. Raises Interrupted after a stop request."""
    for trial in trials:
        trial.reader.eval()
    stacks, places = _stacked_readers(group, trials)
    unread = iter(batches)
    for _ in range(len(batches)):
        fetched = next_or_error(unread)
        raise_on_any_rank(group.accelerator, fetched if isinstance(fetched, UserError) else None, group.stop)
        if group.stop.agreed:
            stop_all_ranks(group.accelerator, f"{group.path}: stopped while scoring a split; the same command resumes")
        batch = send_to_device(fetched, group.accelerator.device, non_blocking=True)
        logits = read(stacks, observed_stream(group, batch))
        yield batch, [logits[place] for place in places]


def _check_finite(trial: Trial, name: str, value: float, step: int) -> None:
    trial.diverged = trial.diverged or not_finite(name, value, step)


def _sum_over_processes(group: TrialGroup, sums: Tensor) -> Tensor:
    """Sum ``sums`` and the gradients over all processes, in one message; returns the sums."""
    if group.accelerator.num_processes == 1:
        return sums
    tensors = [sums, *(gradient for stack in group.stacks for gradient in stack.gradients)]
    flat = group.accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), "sum")
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
    return sums


@torch.no_grad()
def quick_scores(group: TrialGroup, trials: Sequence[Trial], batches: EvalBatches) -> list[QuickScores]:
    """The loss and the score that decides, of each trial, and its thresholds; all other scores are for the end."""
    if batches.multiple:  # mAP is no sum over batches
        return [QuickScores(score.compute(), score.thresholds) for score in score_batches(group, trials, batches)]
    sums_3T = torch.zeros(3, len(trials), device=group.accelerator.device)
    for batch, logits in _read_split(group, trials, batches):
        logits_TBK, counts_B = torch.stack(logits), batch["weight"]
        losses_TB = image_losses(logits_TBK, batch["labels"])
        sums_3T[0] += torch.where(counts_B > 0, losses_TB * counts_B, 0.0).sum(1)
        sums_3T[1] += (right_answers(logits_TBK, batch["labels"]) * counts_B).sum(1)
        sums_3T[2] += counts_B.sum()
    loss_T, correct_T, images_T = group.accelerator.reduce(sums_3T, "sum").tolist()
    if not images_T[0]:
        raise no_readable_image(batches.split)
    return [
        QuickScores({"loss": loss / images, "top1": 100 * correct / images})
        for loss, correct, images in zip(loss_T, correct_T, images_T, strict=True)
    ]
