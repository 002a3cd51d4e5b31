"""The recipe: a typed description of one run, with a section for each part."""

from collections.abc import Iterator
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from dist_vpt.backbones.config import BackboneConfig, MemberConfig
from dist_vpt.data.config import DataConfig
from dist_vpt.data.tasks import EMBEDDED
from dist_vpt.frozen_stream.config import StreamConfig
from dist_vpt.methods.config import MethodConfig, VPTConfig
from dist_vpt.methods.config_readers import ComboConfig
from dist_vpt.recipe.fields import Policy, Section
from dist_vpt.recipe.optim_section import OptimConfig
from dist_vpt.recipe.sweep_section import SweepConfig
from dist_vpt.recipe.trackers import TrackerName
from dist_vpt.recipe.writer_settings import mistakes_of_writer_settings
from dist_vpt.recipe.yaml import Dumper

LARGE_ADAMW_LR = 0.1  # at which every number moves by a typical token in a step
Protocol = Literal["default", "published"]


class EarlyStopConfig(Section):
    """Stop when the validation accuracy stops rising."""

    patience: int = Field(10, ge=1, description="evaluations without a rise after which training stops")
    min_delta: float = Field(0.0, ge=0, description="the smallest rise that counts, in percentage points")


class TrainConfig(Section):
    """The training loop: epochs, batch size and loss."""

    epochs: int = Field(100, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=1, description="GLOBAL batch size: images per optimizer step, over all processes")
    grad_accum_steps: int = Field(
        1, ge=1, description="micro-batches per optimizer step that each process computes one after another"
    )
    eval_batch_size: int = Field(128, ge=1, description="images per process and step in evaluation")
    eval_every: int = Field(1, ge=1, description="evaluate on the validation split every so many epochs")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the target (0 to 1) that is spread evenly over all classes; of several labels an image, "
        "over yes and no",
    )
    class_weights: Literal["none", "inv", "inv_sqrt"] = Field(
        "none",
        description="weight of a class in the loss: 1, 1/images or 1/sqrt(images), scaled to a mean of 1 over images; "
        "of several labels an image, inv: a class's positives have the weight negatives/positives",
    )
    sampling: Literal["shuffle", "balanced"] = Field(
        "shuffle",
        description="images of an epoch: shuffle: each once; balanced: as many draws with replacement, all classes "
        "being equally likely (as torch's WeightedRandomSampler with weights of 1/images)",
    )
    mixup_alpha: float = Field(
        0.0,
        ge=0,
        description="mixup (Zhang et al. 2018, arXiv 1710.09412; timm.data.Mixup): pairs of images of a global batch "
        "are mixed by a share drawn for the batch from Beta(alpha, alpha), and so are their losses; 0: off",
    )
    cutmix_alpha: float = Field(
        0.0,
        ge=0,
        description="CutMix (Yun et al. 2019, arXiv 1905.04899; timm.data.Mixup): a box of one image of a pair is "
        "pasted into the other, as large as a share drawn from Beta(alpha, alpha); 0: off",
    )
    mixup_prob: float = Field(
        1.0, gt=0, le=1, description="mixup, CutMix: share of the global batches whose images are mixed, 0 to 1"
    )
    mixup_switch_prob: float = Field(
        0.5, ge=0, le=1, description="mixup and CutMix both on: share of the mixed batches that CutMix gets, 0 to 1"
    )
    model_ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="score and save an exponential moving average of the trained tensors over the steps (timm's "
        "ModelEmaV3; Polyak and Juditsky 1992): the share of the average that a step keeps, such as 0.999; null: none",
    )
    model_ema_warmup: bool = Field(
        False,
        description="model_ema_decay: begin with a smaller decay, 1 - (1 + step)^(-2/3), as for short trainings",
    )
    data_seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed of data order and augmentation; null: the recipe's seed"
    )
    early_stop: EarlyStopConfig | None = Field(None, description="early stopping on the validation split; null: none")
    test: bool = Field(True, description="evaluate on the test split once, after training")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        mistakes = []
        if self.mixup_prob != 1 and not self.mixes:
            mistakes.append(
                f"mixup_prob = {self.mixup_prob:g}: nothing is mixed; set mixup_alpha or cutmix_alpha, or leave it out"
            )
        if self.mixup_switch_prob != 0.5 and not (self.mixup_alpha and self.cutmix_alpha):
            mistakes.append(
                f"mixup_switch_prob = {self.mixup_switch_prob:g}: needs mixup and CutMix; set mixup_alpha and "
                "cutmix_alpha, or leave it out"
            )
        if self.model_ema_warmup and self.model_ema_decay is None:
            mistakes.append("model_ema_warmup = true: there is no average; set model_ema_decay, or leave it out")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class RuntimeConfig(Section):
    """Device, precision, memory and kernels."""

    device: Literal["auto", "cpu"] = Field("auto", description="auto: the accelerator if there is one, else the CPU")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="of activations and frozen weights; trained tensors are always float32. auto: bf16 on GPUs that "
        "have units for it and on CPUs that multiply faster in it, else fp32",
    )
    quantize: Literal["none", "int8"] = Field(
        "none",
        description="frozen weights in memory: none: in runtime.precision; int8: the blocks' linear layers in 8 bits, "
        "with a scale per row, dequantized on use (pip install 'dist-vpt[int8]')",
    )
    activation_checkpointing: Policy = Field(
        "none",
        description="what backward recomputes instead of keeping: none; mlp: the inside of each MLP; block: everything "
        "but each block's input; every-N: the same in every N-th block; budget-F: the cheapest operations first, until "
        "at most the fraction F (such as 0.5) of the activations is kept",
    )
    offload: bool = Field(False, description="keep activations for backward in host memory; needs a GPU")
    attention: Literal["auto", "sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash", "eager"] = Field(
        "auto",
        description="attention kernel: sdpa: torch's scaled_dot_product_attention with the kernel that torch chooses, "
        "sdpa_NAME: with this kernel; flash: a flash-attn package (pip install 'dist-vpt[flash]'); eager: plain matrix "
        "products; auto: sdpa, or eager where it is faster (training through the blocks on a CPU in bf16 with at most "
        "256 tokens)",
    )
    compile: bool | None = Field(
        None,
        description="compile each block (torch.compile); without a C compiler it is logged and skipped; null: on CUDA, "
        "where a method trains through the blocks for long enough (an estimate of ten minutes uncompiled)",
    )
    tf32: bool | None = Field(
        None,
        description="compute products of float32 numbers in TF32 on a GPU: faster, with 10 of 23 bits; null: yes, "
        "unless deterministic",
    )
    memory_check: Literal["refuse", "warn", "ignore"] = Field(
        "refuse", description="what to do on a GPU when the estimate of `dist-vpt plan` exceeds its memory"
    )
    deterministic: bool = Field(
        False, description="use deterministic kernels only: repeatable to the last bit, but slower"
    )


class RunConfig(Section):
    """The run folder, saving, resuming and logging."""

    dir: str | None = Field(None, min_length=1, description="the run folder; null: runs/<names of the recipes>")
    resume: Literal["never", "auto"] = Field(
        "never",
        description="auto: resume from the newest state in the folder, if there is one; never: refuse a used folder",
    )
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between saved states; null: every epoch, in a reader's sweep every 30 seconds",
    )
    log_every: int = Field(10, ge=1, description="steps between log lines and TensorBoard scalars")
    trackers: list[TrackerName] = Field(
        ["tensorboard"], description="where curves, hyperparameters and scores are logged, by Accelerate's names"
    )
    timeout_minutes: float = Field(
        30.0, gt=0, description="how long a process waits for the others before it fails, in minutes"
    )


class Recipe(Section):
    """A whole run."""

    protocol: Protocol = Field(
        "default",
        description="whose settings a method's recipe sets: default: this package's, which do not depend on a "
        "backbone's scale; published: those of the method's paper, from the section `published` of the recipe. "
        "`dist-vpt sweep` and `dist-vpt suite` take published unless it is given",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initialization, data order, augmentation and dropout")
    data: DataConfig = Field(default_factory=DataConfig, description="task, storage format, preprocessing")
    backbone: BackboneConfig = Field(default_factory=BackboneConfig, description="the frozen transformer")
    backbones: tuple[MemberConfig, ...] | None = Field(
        None,
        description="several backbones in place of `backbone` (linear, mlp, knn, logistic, combo): each a mapping as "
        "`backbone`, with image_size too, or the name of a backbone's recipe (also as `base` of a mapping), such as "
        "[dinov2_s14, demo]",
    )
    method: MethodConfig = Field(default_factory=VPTConfig, description="what is trained, and its settings")
    stream: StreamConfig = Field(default_factory=StreamConfig, description="where readers cache the frozen stream")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="optimizer, learning rate, schedule")
    train: TrainConfig = Field(default_factory=TrainConfig, description="epochs, batch size, loss")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="device, precision, memory, kernels")
    run: RunConfig = Field(default_factory=RunConfig, description="run folder, saving, resuming, logging")
    sweep: SweepConfig = Field(default_factory=SweepConfig, description="grid and seeds of `dist-vpt sweep`")

    @property
    def members(self) -> tuple[BackboneConfig, ...]:
        """The backbones that are read together; mostly one."""
        return self.backbones or (self.backbone,)

    @property
    def data_seed(self) -> int:
        """The seed of data order and augmentation."""
        return self.seed if self.train.data_seed is None else self.train.data_seed

    @property
    def backbone_name(self) -> str:
        """Of all backbones."""
        return " + ".join(member.name for member in self.members)

    @property
    def of_each_backbone(self) -> "tuple[Recipe, ...]":
        """The recipe with one of its backbones alone, for each of them."""
        if self.backbones is None:
            return (self,)
        sizes = [member.image_size or self.data.image_size for member in self.backbones]
        return tuple(
            self.changed("data", image_size=size).model_copy(update={"backbone": member, "backbones": None})
            for member, size in zip(self.backbones, sizes, strict=True)
        )

    @property
    def warnings(self) -> list[str]:
        """Messages about settings that are allowed but probably not intended."""
        found = []
        if any(member.name == "demo" for member in self.members) and self.data.stored not in EMBEDDED:
            found.append(
                "the backbone is demo, which was trained on printed letters of 24 px only; for other images name a "
                "backbone's recipe (`dist-vpt recipe list`)"
            )
        if self.optim.name == "adamw" and self.optim.peak_lr(self.train.batch_size) > LARGE_ADAMW_LR:
            found.append(
                f"optim.lr = {self.optim.lr:g} is large for optim.name = adamw, the default; rates of published code "
                "go with its settings (protocol=published), or with optim.name=sgd optim.scale_lr=true"
            )
        if self.train.sampling == "balanced" and self.train.class_weights != "none":
            found.append(
                f"train.sampling = balanced and train.class_weights = {self.train.class_weights} both make up for the "
                "numbers of images, so that small classes count for more than large ones; set either"
            )
        return found

    @model_validator(mode="after")
    def _rules(self) -> Self:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.optim.warmup_epochs >= self.train.epochs:
            yield (
                f"optim.warmup_epochs = {self.optim.warmup_epochs}: must be below train.epochs = {self.train.epochs}; "
                "lower it or raise train.epochs"
            )
        if self.train.batch_size % self.train.grad_accum_steps:
            yield (
                f"train.grad_accum_steps = {self.train.grad_accum_steps}: must divide train.batch_size = "
                f"{self.train.batch_size}; use a divisor"
            )
        if self.train.early_stop and self.data.train_on == "trainval":
            yield (
                "train.early_stop needs a validation split, and data.train_on = trainval leaves none: "
                "set data.train_on=train or train.early_stop=null"
            )
        if self.data.tries > len(self.sweep.seeds):
            yield (
                f"data.tries = {self.data.tries}: each try is trained with a seed of its own, and sweep.seeds has "
                f"{len(self.sweep.seeds)}; give as many seeds, or fewer tries"
            )
        method = f"method.name = {self.method.name}"
        if self.stream != StreamConfig() and not self.method.reader:
            yield f"stream: {method} changes the image tokens, so there is no frozen stream; leave stream out"
        if self.backbone.drop_path > 0 and self.method.reader:
            yield (
                f"backbone.drop_path = {self.backbone.drop_path}: {method} trains nothing in the backbone; "
                "set backbone.drop_path=0"
            )
        yield from self._mistakes_of_labels()
        if self.method.fitted and self.train.sampling == "balanced":
            yield (
                f"train.sampling = balanced: {method} is fitted to each image once; use train.class_weights=inv, or "
                "leave it out"
            )
        yield from self._mistakes_of_several()
        yield from mistakes_of_writer_settings(self.method, self.optim, self.data, self.train)
        if self.method.reader:
            for name, unused in (("activation_checkpointing", "none"), ("offload", False)):
                if (value := getattr(self.runtime, name)) != unused:
                    yield (f"runtime.{name} = {value}: {method} keeps no activations of the backbone; leave it out")
        if self.runtime.quantize == "int8" and self.method.name in ("full", "partial", "vqt"):
            does = "reads the blocks' weights itself" if self.method.name == "vqt" else "trains the blocks' weights"
            yield f"runtime.quantize = int8: {method} {does}; set runtime.quantize=none"
        if self.runtime.compile and self.runtime.activation_checkpointing.startswith("budget"):
            yield (
                f"runtime.compile = true with runtime.activation_checkpointing = "
                f"{self.runtime.activation_checkpointing}: a budget cannot choose among the operations of a "
                "compiled block; use mlp, block or every-N, or compile=false"
            )

    def _mistakes_of_labels(self) -> Iterator[str]:
        if self.data.labels == "single":
            return
        if self.method.fitted:
            yield (
                f"data.labels = multiple: method.name = {self.method.name} is fitted to one label an image; use linear "
                "or another method that is trained"
            )
        if self.train.sampling == "balanced":
            yield (
                "train.sampling = balanced: draws by the one label of an image; with data.labels = multiple use "
                "train.class_weights=inv"
            )
        if self.train.class_weights == "inv_sqrt":
            yield (
                "train.class_weights = inv_sqrt: is of one label an image; with data.labels = multiple use inv, which "
                "balances the positives and negatives of each class, or none"
            )

    def _mistakes_of_several(self) -> Iterator[str]:
        if self.backbones is None:
            if isinstance(self.method, ComboConfig) and self.method.group_penalty:
                yield (
                    f"method.group_penalty = {self.method.group_penalty:g}: compares several backbones; set "
                    "backbones, or leave it out"
                )
            return
        if len(self.backbones) < 2:
            yield f"backbones: has {len(self.backbones)} of them; name two or more, or one in `backbone`"
        if not self.method.joins:
            yield (
                f"backbones: method.name = {self.method.name} has one backbone; give it in `backbone`, or choose "
                "linear, mlp, knn, logistic or combo"
            )
        if self.backbone != BackboneConfig():
            yield (
                f"backbones: backbone.name = {self.backbone.name} is given too, and a run has either; put it into the "
                "list, or leave it out"
            )
        twice = next((each for n, each in enumerate(self.backbones) if each in self.backbones[:n]), None)
        if twice:
            yield f"backbones: {twice.name} is given twice; leave one out"
        if any(member.drop_path for member in self.backbones):
            yield f"backbones: drop_path: method.name = {self.method.name} trains nothing in a backbone; leave it out"
        if self.data.augment not in (None, "none"):
            yield (
                f"data.augment = {self.data.augment}: several backbones see the same images, each at a size of its "
                "own, so that nothing can be drawn; leave it out"
            )

    def changed(self, section: str, **changes: Any) -> Self:
        """A copy with other values in a section; they are not checked, but their keys are."""
        part = getattr(self, section)
        assert changes.keys() <= type(part).model_fields.keys(), f"{section} has no {changes.keys()}"
        return self.model_copy(update={section: part.model_copy(update=changes)})

    def to_yaml(self) -> str:
        """The resolved recipe with every key; loading it gives an equal recipe."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=110)


def json_schema() -> dict[str, Any]:
    """A JSON Schema of recipe files, for editors."""
    schema = Recipe.model_json_schema()
    base = {
        "description": "recipes to inherit from: names, or files relative to this one; later ones win, this file last",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    published = {
        "title": "Published",
        "additionalProperties": False,
        "description": "what is merged on top of this file with protocol: published",
        "type": "object",
        "properties": {name: part for name, part in schema["properties"].items() if name != "protocol"},
    }
    name = {"type": "string", "description": "name of a backbone's recipe, or a file, that the other keys change"}
    schema["$defs"]["MemberConfig"]["properties"]["base"] = name
    several = schema["properties"]["backbones"]["anyOf"][0]
    several["items"] = {"anyOf": [{"type": "string"}, several["items"]]}
    schema["properties"] = {"base": base, "published": published, **schema["properties"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
