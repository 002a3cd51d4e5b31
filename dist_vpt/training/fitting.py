"""Readers that are fitted to all features at once, in the engine's loop: an epoch collects them, and its end fits.

B images of a batch, n of the split, F features.

Several processes share the batches, gather the features, and each fits the same readers to all of them.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dist_vpt.data.loaders import PADDING, Batch
from dist_vpt.distributed.collectives import raise_on_any_rank, stop_all_ranks
from dist_vpt.errors import Interrupted, UserError
from dist_vpt.methods.fitted import FittedReader, Observed
from dist_vpt.runs.scores import main_score
from dist_vpt.training.metrics import no_readable_image
from dist_vpt.training.step import weigh_global_batch
from dist_vpt.training.trials import TrialGroup, observed_stream, quick_scores


@dataclass(kw_only=True)
class FittedGroup(TrialGroup):
    """Trials that are fitted together after one pass over the images, whatever train.epochs is."""

    at_epoch_end: ClassVar[str] = "while it was fitted or val was scored"
    saved: ClassVar[str] = "to be fitted again"
    collected: list[tuple[Tensor, ...]] = field(default_factory=list)  # features, labels, weights, rows of a batch

    @property
    def ended(self) -> bool:
        return self.progress.epoch > 0

    @property
    def readers(self) -> list[FittedReader]:
        """Those of the trials."""
        return [trial.reader for trial in self.trials if isinstance(trial.reader, FittedReader)]

    @torch.no_grad()
    def take_step(self, fetched: list[Batch] | UserError) -> None:
        micro_batches, _ = weigh_global_batch(self.accelerator, fetched, self.class_weights, self.stop)
        self.accelerator.status.set(f"step {self.step}", "computing features", limited=True)
        for batch, weights_B in micro_batches:
            features_BF = self.readers[0].stream_features(observed_stream(self, batch))
            found = (features_BF, batch["labels"], torch.stack([weights_B, batch["weight"]], 1), batch["index"])
            if self.accelerator.num_processes > 1:
                with self.accelerator.status.in_collective():
                    found = self.accelerator.gather(found)
            self.collected.append(found)
        self.progress.step += 1

    def end_epoch(self) -> None:
        self.accelerator.status.set("the features", "fitting")
        readers, observed = self.readers, self._observed()
        try:
            if not observed.features_nF.isfinite().all():
                raise UserError(
                    f"method.name = {self.recipe.method.name}: features of training images are not finite; set "
                    "runtime.precision=fp32, or use other weights"
                )
            scores, lines = type(readers[0]).fit(readers, observed, self._raise_on_stop)
        except Interrupted:
            scores, lines = [], []  # the others hear of it when they have fitted
        except UserError as error:
            error.shared = True  # all processes have the same features
            raise
        raise_on_any_rank(self.accelerator, None, self.stop)
        if self.stop.agreed:
            stop_all_ranks(self.accelerator, "stopped while readers were fitted")  # to which the engine adds the rest
        for line in lines:
            self.show(line)
        for trial, score in zip(self.trials, scores, strict=True):
            trial.progress.images = len(observed.labels_n)
            trial.progress.epoch, trial.progress.last = 1, {"epoch": 1, "train": score}
        if self.val is not None:
            self.accelerator.status.set("the features", "scoring val")
            for trial, found in zip(self.trials, quick_scores(self, self.trials, self.val), strict=True):
                trial.progress.scored(found.scores, None)
            values = [main_score(trial.progress.last["val"]) for trial in self.trials]
            self.show(
                f"val {self.recipe.data.metric} of {len(values)} trials: {min(values):.2f} to {max(values):.2f} %"
            )
        self.progress.epoch, self.progress.step = 1, 0

    def _raise_on_stop(self) -> None:
        if self.stop.requested:
            raise Interrupted("stopped while readers were fitted")

    def _observed(self) -> Observed:
        """All images that could be read, in the order of their split, which is the same whatever collected them."""
        features, labels, weights, rows = (torch.cat(column) for column in zip(*self.collected, strict=True))
        self.collected.clear()
        order = rows.argsort()
        order = order[(rows[order] != PADDING) & (weights[order, 1] > 0)]
        if not len(order):
            error = no_readable_image(self.recipe.data.train_on)
            error.shared = True
            raise error
        smoothing = self.recipe.train.label_smoothing
        return Observed(features[order], labels[order], weights[order, 0], smoothing)

    def save_is_due(self) -> bool:
        return False

    def write_state(self) -> str | None:
        """Nothing: it takes seconds to fit again. A collective call, since all processes get here together."""
        return broadcast_object_list([None])[0]

    def log_step(self) -> None:
        """There is no rate to report yet."""
