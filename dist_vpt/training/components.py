"""From a recipe to the components of a run: inputs, splits, and the backbone with its method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from dist_vpt.backbones.build import build
from dist_vpt.backbones.config import naming_member
from dist_vpt.backbones.group import BackboneGroup
from dist_vpt.backbones.vit import Backbone
from dist_vpt.backbones.weights.convert import LoadReport, joined_reports
from dist_vpt.backbones.weights.zoo import has_learned_positions
from dist_vpt.data.depth import depth_warning
from dist_vpt.data.duplicates import leak_warning, repeats
from dist_vpt.data.formats import open_splits
from dist_vpt.data.joined import Joined
from dist_vpt.data.label_notes import label_notes
from dist_vpt.data.loaders import Batch, EvalBatches, TrainBatches
from dist_vpt.data.orientation import orientation_note
from dist_vpt.data.pieces import spread_rows
from dist_vpt.data.splits import Splits
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.launch_env import ALONE, LaunchEnv
from dist_vpt.distributed.limits import check_open_files
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.distributed.zero import gathered_when_called
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamSpec
from dist_vpt.frozen_stream.placement import Sharing, open_streams, step_bytes
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method, Reader
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.writer_settings import training_extras
from dist_vpt.runtime.allocator import give_back_freed_memory
from dist_vpt.runtime.apply import apply_runtime
from dist_vpt.training.class_weights import class_weights
from dist_vpt.training.inputs import Inputs, resolve_inputs
from dist_vpt.training.learning import Guessing
from dist_vpt.training.metrics import no_readable_image

IMAGES_SHARE = 0.05  # of a GPU's free memory, for images; `plan` leaves 6 % of a device unused
INIT_IMAGES = 256  # training images, at most so many, from which a method is initialized
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Components:
    """The parts built from a recipe (inputs, splits, method), before any device or process is involved."""

    inputs: Inputs
    splits: Splits
    method: Method
    load_report: LoadReport  # between the backbone's tensors and its file's
    recipe: Recipe
    launch: LaunchEnv

    @property
    def transform(self) -> ImageTransform:
        """The images' of the first backbone."""
        return self.inputs.transform

    def protocol(self) -> dict[str, Any]:
        """The evaluation protocol for result.json: the splits that were read and how images were transformed."""
        data, task, splits = self.recipe.data, self.inputs.task, self.splits
        given = None if data.mean is None else f"mean {list(data.mean)}, std {list(data.std or ())}"
        names = ("train", "val", "trainval", "test")
        return {
            "settings": self.recipe.protocol,
            "storage": splits.storage,
            "resize": self.transform.interpolation,
            "fit": self.transform.crop_mode,
            "augment": self.transform.augment,
            "normalize": given or task.normalize,
            "image_size": self.transform.image_size,
            "exif": task.exif,
            "background": task.background,
            "fraction": data.fraction,
            "carved": list(splits.held_out),
            "counts": {name: len(split) if (split := getattr(splits, name)) else None for name in names},
            "notes": list(splits.notes),
            **({"shots": data.shots} if data.shots else {}),
            **({"test_crops": data.test_crops} if data.test_crops > 1 else {}),
            **({"extras": extras} if (extras := training_extras(self.recipe)) else {}),
            **self._of_backbones(),
        }

    def _of_backbones(self) -> dict[str, Any]:
        """What of the protocol is a backbone's own."""
        resized = [each.positions for each in self.recipe.members if has_learned_positions(each.name)]
        found: dict[str, Any] = {"position_resize": resized[0]} if resized else {}
        if self.inputs.others:
            found["image_sizes"] = [transform.image_size for transform in self.inputs.transforms]
        return found

    def remarks(self) -> list[str]:
        """Lines for the log about the splits: what was split off train, and what was found and not read."""
        sizes = [f"{name} ({len(self.splits[name]):,} images)" for name in self.splits.held_out]
        lines = (
            [f"split off train by data.split_seed = {self.recipe.data.split_seed}: {', '.join(sizes)}"] if sizes else []
        )
        if self.splits.drawn:
            data = self.recipe.data
            sizes = [f"{len(self.splits[name]):,} images of {name}" for name in self.splits.drawn]
            of = f"shots {data.shots}" if data.shots else f"fraction {data.fraction:g}"
            seed = f"data.split_seed = {data.split_seed}, data.try_index = {data.try_index}"
            lines.append(f"{of}: {' and '.join(sizes)}, drawn by {seed}")
        if self.recipe.train.sampling == "balanced":
            labels = self.splits[self.recipe.data.train_on].labels
            counts = np.unique(labels, return_counts=True)[1]
            lines.append(
                f"train.sampling = balanced: an epoch draws {len(labels) / len(counts):.0f} images of each class on "
                f"average, from {counts.min():,} to {counts.max():,} that it has"
            )
        lines += [f"note: {note}" for note in (*self.splits.notes, *self.splits.remarks)]
        lines += label_notes(self.splits, val=self.recipe.data.train_on == "train")
        if self.launch.rank:
            return lines
        splits, task = self.splits, self.inputs.task
        if task.group is None and (warning := depth_warning(splits.train)):
            lines.append(f"warning: {warning}")
        own = task.group is None and self.recipe.data.check_leaks
        if own:
            lines += [f"warning: {found}" for found in repeats(splits.train, splits.val, splits.test)]
        if own and splits.test is not None and (warning := leak_warning(splits.trainval, splits.test)):
            lines.append(f"warning: {warning}")
        if task.group is not None and task.exif == "ignore" and (note := orientation_note(splits.trainval)):
            lines.append(f"note: {note}")
        return lines

    def seeded(self) -> dict[str, list[str]]:
        """Files of the splits that a seed took out of train or drew from, for splits.json."""
        names = dict.fromkeys((*self.splits.drawn, *self.splits.held_out))
        splits = {name: self.splits[name] for name in names}
        return {name: [split.where(i) for i in range(len(split))] for name, split in splits.items()}

    def loader_options(self, rank: int, world: int) -> dict[str, Any]:
        """The arguments that training and evaluation batches of a process have in common."""
        data = self.recipe.data
        return {
            "rank": rank,
            "world": world,
            "local_world": self.launch.local_world_size,
            "workers": data.workers,
            "on_decode_error": data.on_decode_error,
            "max_megapixels": data.max_megapixels,
            "cache": self.inputs.task.cache,
        }

    def training(self, rank: int, world: int) -> TrainBatches:
        """Shuffled batches of the split that the recipe trains on. Raises UserError where they cannot be split."""
        recipe = self.recipe
        options = self.loader_options(rank, world) | {
            "batch_size": recipe.train.batch_size,
            "accumulate": recipe.train.grad_accum_steps,
            "seed": recipe.data_seed,
            "same_size": self.method.backbone.compiled,
            "sampling": recipe.train.sampling,
            "pairs": recipe.train.mixes,
        }
        if recipe.data.rand_augment and recipe.data.cache is None:
            options["cache"] = "none"  # from one in memory no workers augment
        split = self.splits[recipe.data.train_on]
        first, *others = (TrainBatches(split, transform, **options) for transform in self.inputs.transforms)
        return first.join(others)

    def evaluation(self, split: str, rank: int, world: int) -> EvalBatches:
        """Batches with every image of a split once, over all processes; test, which is read once, is never cached."""
        first, *others = (self._scored(split, transform, rank, world) for transform in self.inputs.transforms)
        return first.join(others)

    def _scored(self, split: str, transform: ImageTransform, rank: int, world: int) -> EvalBatches:
        """Those for one backbone."""
        once = split == "test" or split in self.splits.extra
        loader_options = self.loader_options(rank, world) | ({"cache": "none"} if once else {})
        size = max(1, self.recipe.train.eval_batch_size // transform.test_crops)  # as many views as otherwise images
        same = self.method.backbone.compiled
        return EvalBatches(self.splits[split], transform, size, same_size=same, **loader_options)

    def validation(self, rank: int, world: int) -> EvalBatches | None:
        """Batches of val, unless there is none or it is trained on."""
        is_held_out = self.recipe.data.train_on == "train" and self.splits.val
        return self.evaluation("val", rank, world) if is_held_out else None

    def class_weights(self, device: torch.device) -> Tensor:
        """Weight of each class in the loss, [K], from the split that the recipe trains on.

        Of several labels an image, that of the class's positives.
        """
        labels = self.splits[self.recipe.data.train_on].labels
        return class_weights(self.recipe.train.class_weights, labels, len(self.splits.classes)).to(device)

    def guessing(self) -> Guessing:
        """What guessing would score on the images that are trained on, as they are drawn."""
        labels, train = self.splits[self.recipe.data.train_on].labels, self.recipe.train
        weights_K, balanced = self.class_weights(torch.device("cpu")).double().numpy(), train.sampling == "balanced"
        return Guessing.of(labels, weights_K, train.label_smoothing, balanced=balanced)

    def init_method(self, device: torch.device, readers: Sequence[Reader] = ()) -> None:
        """Show a method that is initialized from images some of the split that is trained on, evenly spread over it.

        Every process shows it the same ones, so that all start alike. ``readers``: others on the same backbone, which
        share the frozen stream with it. Raises DataError where no image can be read.
        """
        methods = [method.to(device) for method in (self.method, *readers) if method.inits_from_images]
        if not methods:
            return
        split, size = self.splits[self.recipe.data.train_on], self.recipe.train.eval_batch_size
        rows = spread_rows(split, INIT_IMAGES)
        options, shown = self.loader_options(rank=0, world=1) | {"cache": "none"}, split.subset(split.name, rows)
        first, *others = (
            EvalBatches(shown, transform, size, **options) for transform in self.inputs.one_view().transforms
        )
        loader = first.join(others)
        batches = [send_to_device(readable(batch), device) for batch in loader if batch["weight"].any()]
        loader.close()
        if not batches:
            raise no_readable_image(split.name)
        with gathered_when_called(self.method.backbone.blocks):
            Method.init_together(methods, batches, self.recipe.seed)

    def keep_images_on_device(self, accelerator: RankAccelerator, *loaders: TrainBatches | EvalBatches | None) -> None:
        """Let ``data.cache: memory`` keep images on a GPU, where they take a small part of what is free there."""
        if accelerator.device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(accelerator.device)
        sharing = Sharing.of(accelerator.launch, 0)
        found = [loader for loader in loaders if loader is not None]
        for loader in found:
            loader.keep_on(accelerator.device, IMAGES_SHARE * free / sharing.on_gpu / len(found))

    def use_cached_stream(
        self,
        accelerator: RankAccelerator,
        train: TrainBatches,
        val: EvalBatches | None,
        stop: StopSignal,
        *,
        shared: bool = False,
    ) -> str:
        """For a reader, take batches from a cache of the frozen stream as the recipe says; returns a line for the log.

        ``shared``: several readers will share each batch. A collective call. The backbone must be on its device.
        Raises Interrupted after a stop request.
        """
        if not isinstance(self.method, Reader):
            return ""
        recipe = self.recipe
        wanted: dict[str, TrainBatches | EvalBatches] = {recipe.data.train_on: train}
        if val is not None:
            wanted["val"] = val
        if self.transform.augment != "none":
            if recipe.stream.cache not in ("auto", "none"):
                raise UserError(
                    f"stream.cache = {recipe.stream.cache}: data.augment = {self.transform.augment} changes each image "
                    "in every epoch; set stream.cache=auto (which keeps val alone) or data.augment=none"
                )
            del wanted[recipe.data.train_on]
        passes = 1 if recipe.method.fitted else recipe.train.epochs
        return self._open_streams(accelerator, wanted, stop, passes, shared=shared)

    def use_stream_files(self, accelerator: RankAccelerator, test: EvalBatches, stop: StopSignal) -> None:
        """Take test's batches from stream.dir, where stream.cache = disk and a reader reads pooled features alone.

        Test is read once in a run, but these few numbers an image serve all runs. A collective call.
        """
        specs = self.method.specs if isinstance(self.method, Reader) else ()
        if self.recipe.stream.cache == "disk" and set(specs) == {StreamSpec()}:
            self._open_streams(accelerator, {test.split: test}, stop, 2)

    def _open_streams(
        self,
        accelerator: RankAccelerator,
        wanted: Mapping[str, TrainBatches | EvalBatches],
        stop: StopSignal,
        passes: int,
        *,
        shared: bool = False,
    ) -> str:
        """Let batches come from the cache of each backbone's stream; returns a line for the log."""
        assert isinstance(self.method, Reader)
        recipe, method, lines = self.recipe, self.method, []
        batch = max(recipe.train.batch_size // accelerator.num_processes, recipe.train.eval_batch_size)
        members = method.backbone.members
        kept = (method.shared_spec,) if shared and len(members) == 1 else method.specs
        step = sum(step_bytes(backbone, spec, batch) for backbone, spec in zip(members, kept, strict=True))
        for number, backbone in enumerate(members):
            transform = self.inputs.transforms[number]
            with naming_member(recipe.members, number):
                caches, line = open_streams(
                    recipe.stream,
                    recipe.data,
                    backbone,
                    (kept[number], method.specs[number]),
                    transform,
                    {name: (self.splits[name], partial(self._scored, name, transform)) for name in wanted},
                    accelerator,
                    stop,
                    passes=passes,
                    step=step,
                )
            for name, cache in caches.items():
                wanted[name].use(cache, number)
            lines.append(line if len(recipe.members) == 1 else f"{recipe.members[number].name}: {line}")
        return "\n".join(lines)


def build_components(
    recipe: Recipe, launch: LaunchEnv = ALONE, *, defer: bool = False, trains: bool = True
) -> Components:
    """Open the data, build and load the backbone, attach the method, seeded by the recipe.

    ``defer``: leave matrices of the backbone in their file, for ``load_backbone``. ``trains``: whether it is trained;
    by default blocks are compiled for a long training alone.
    """
    check_open_files(recipe.data.workers)
    inputs = resolve_inputs(recipe)
    splits = open_splits(recipe.data, inputs.task)
    if recipe.train.test:
        splits["test"]  # a missing one is reported now, not after hours of training
    # Of a process. ZeRO gathers weights from hooks, which a compiler cannot follow: there it must be asked for.
    images = (
        0
        if launch.deepspeed or not trains
        else len(splits[recipe.data.train_on]) * recipe.train.epochs // launch.world_size
    )
    method, load_report = build_method(recipe, inputs, len(splits.classes), images, defer=defer)
    return Components(inputs, splits, method, load_report, recipe, launch)


def build_method(
    recipe: Recipe, inputs: Inputs, classes: int, images: int = 0, *, defer: bool = False
) -> tuple[Method, LoadReport]:
    """The frozen backbone with the method attached, and the difference from its weight file.

    ``images``: how many this process will train on, over all epochs. ``defer``: leave matrices of the backbone in their
    file, unless they are quantized.
    """
    backbone, load_report = build_backbone(recipe, inputs, defer=defer)
    return attach_method(recipe, backbone, classes, images), load_report


def build_backbone(recipe: Recipe, inputs: Inputs, *, defer: bool = False) -> tuple[Backbone, LoadReport]:
    """The recipe's backbone in float32, or the group of its backbones, and the difference from the weight files."""
    defer = defer and recipe.runtime.quantize == "none"
    if defer:
        give_back_freed_memory()  # each matrix is in memory for a moment, and no longer
    backbones, reports = [], []
    for number, (member, each) in enumerate(zip(recipe.members, inputs.of_each, strict=True)):
        torch.manual_seed(recipe.seed)
        with naming_member(recipe.members, number):
            built, load_report = build(
                member,
                image_size=each.transform.image_size,
                mean=each.mean,
                std=each.std,
                frame=recipe.method.frame,
                defer=defer,
            )
        backbones.append(built)
        reports.append(load_report)
    backbone = backbones[0] if len(backbones) == 1 else BackboneGroup(backbones)
    return backbone, joined_reports(reports, [member.name for member in recipe.members])


def attach_method(recipe: Recipe, backbone: Backbone, classes: int, images: int = 0) -> Method:
    """The recipe's method on a backbone without one, with the runtime settings applied."""
    torch.manual_seed(recipe.seed)  # the same initialization whatever the backbone has drawn
    dtype = DTYPES[recipe.runtime.precision]
    method = attach(recipe.method, backbone, classes, dtype)
    for member in backbone.members:
        apply_runtime(member, recipe.runtime, dtype, writes=not isinstance(method, Reader), images=images)
    if isinstance(backbone, BackboneGroup):
        backbone.collect_chosen()
    return method


def readable(batch: Batch) -> Any:
    """The images of a batch that could be read."""
    images, read_B = batch["images"], batch["weight"] > 0
    return images.where(read_B) if isinstance(images, Joined) else images[read_B]


def build_reader(recipe: Recipe, backbone: Backbone, classes: int) -> Reader:
    """Another reader on a backbone that has one already, initialized as it would be alone."""
    torch.manual_seed(recipe.seed)
    reader = attach(recipe.method, backbone, classes, DTYPES[recipe.runtime.precision])
    assert isinstance(reader, Reader)
    return reader
