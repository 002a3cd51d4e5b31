"""The recipe: one typed description of a whole run."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.data.config import DataConfig
from dist_vpt.frozen_stream.config import StreamConfig
from dist_vpt.methods.config import MethodConfig, VPTConfig
from dist_vpt.recipe.yaml import Dumper

if TYPE_CHECKING:
    pass

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel):
    """Optimiser, learning rate and its schedule."""

    name: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="sgd and adam add weight decay to the gradient (L2), adamw decouples it"
    )
    lr: float = Field(1.0, gt=0, description="peak learning rate for a global batch of 256")
    scale_lr: bool = Field(True, description="multiply lr by train.batch_size / 256; false: lr is used as it is")
    weight_decay: float = Field(1e-4, ge=0, description="decay of weights and prompts; biases and norms have none")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd's momentum")
    nesterov: bool = Field(False, description="sgd: Nesterov momentum")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adam, adamw: decay of the first and second moment")
    eps: float = Field(1e-8, gt=0, description="adam, adamw: added to the denominator")
    clip_norm: float | None = Field(None, gt=0, description="the largest global gradient norm; null: no clipping")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after warm-up: cosine to 0, or constant")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear warm-up from 0")
    schedule_by: Literal["step", "epoch"] = Field(
        "step",
        description="how often the rate changes; epoch (the published code): the first epoch of a warm-up has 0",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov = true: with name = {self.name} and momentum = {self.momentum} there is no momentum to look "
                "ahead with; set name=sgd and momentum above 0, or nesterov=false"
            )
        return self

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate at the schedule's height for this global batch."""
        return self.lr * batch_size / 256 if self.scale_lr else self.lr


class Section(BaseModel):
    """A part of the recipe: frozen, and unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EarlyStopConfig(Section):
    """Stop when the validation accuracy no longer rises."""

    patience: int = Field(10, ge=1, description="evaluations without a rise before training stops")
    min_delta: float = Field(0.0, ge=0, description="a rise counts above this many points of percent")


class TrainConfig(Section):
    """The loop: epochs, batch and loss."""

    epochs: int = Field(100, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=1, description="GLOBAL batch: images per optimiser step over all processes")
    grad_accum_steps: int = Field(
        1, ge=1, description="micro-batches that a process computes one after the other per step"
    )
    eval_batch_size: int = Field(128, ge=1, description="images per process and evaluation step")
    eval_every: int = Field(1, ge=1, description="epochs between evaluations on the validation split")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    class_weights: Literal["none", "inv", "inv_sqrt"] = Field(
        "none",
        description="weight of a class in the loss: 1, 1/count or 1/sqrt(count), scaled to a mean of 1 per image",
    )
    data_seed: int | None = Field(
        None, ge=0, lt=2**63, description="of data order and augmentation alone; null: the recipe's seed"
    )
    early_stop: EarlyStopConfig | None = Field(None, description="stop early on the validation split; null: never")
    test: bool = Field(True, description="score the test split once, after training")


POLICY = re.compile(r"^(none|mlp|block|every-[1-9][0-9]*|budget-0\.[0-9]*[1-9][0-9]*)$")


def _policy(value: str) -> str:
    if not POLICY.match(value):
        raise ValueError(f"{value!r}: must be none, mlp, block, every-N (such as every-2) or budget-F (budget-0.5)")
    return value


Policy = Annotated[str, AfterValidator(_policy), Field(json_schema_extra={"pattern": POLICY.pattern})]


class RuntimeConfig(Section):
    """Where and how numbers are computed."""

    device: Literal["auto", "cpu"] = Field("auto", description="auto: the accelerator if there is one")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of activations and frozen weights; what is trained is always float32"
    )
    quantize: Literal["none", "int8"] = Field(
        "none",
        description="how frozen weights are held: none: in runtime.precision; int8: those of the blocks' linear layers "
        "in 8 bits with a scale a row (pip install 'dist-vpt[int8]'), made numbers of where they are used",
    )
    activation_checkpointing: Policy = Field(
        "none",
        description="what is computed again in backward instead of kept: none; mlp: the inside of each MLP; block: all "
        "but each block's input; every-N: that in every N-th block; budget-F: as much as it takes to keep at most F "
        "(such as 0.5) of what none keeps, the cheapest first",
    )
    offload: bool = Field(False, description="keep what blocks keep for backward in host memory; needs a GPU")
    attention: Literal["auto", "sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash", "eager"] = Field(
        "auto",
        description="kernel: sdpa: torch's fused attention, the kernel of torch's choice, or the one named; flash: a "
        "flash-attn package (pip install 'dist-vpt[flash]'); eager: plain, with the attention matrix in memory; auto: "
        "sdpa, but eager where it is quicker (on a CPU, in bf16, up to 256 tokens, gradients through the blocks)",
    )
    compile: bool = Field(
        False, description="compile each block (torch.compile); where no compiler is, the log says so and none is used"
    )
    memory_check: Literal["refuse", "warn", "ignore"] = Field(
        "refuse", description="on a GPU, when `dist-vpt plan` says that the run cannot fit: refuse it, or try"
    )
    deterministic: bool = Field(False, description="deterministic kernels alone: equal to the last bit, and slower")


class RunConfig(Section):
    """The run folder, resuming, logging."""

    dir: str | None = Field(None, min_length=1, description="the run folder; null: runs/<name of the recipe file>")
    resume: Literal["never", "auto"] = Field(
        "never",
        description="auto: go on from the newest state in the folder, if there is one; never: refuse a used folder",
    )
    save_every: int | None = Field(
        None,
        ge=1,
        description="steps between saved states; null: at ends of epochs, in a reader's sweep 30 seconds apart",
    )
    log_every: int = Field(10, ge=1, description="steps between log lines and TensorBoard scalars")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"], description="where curves are sent")
    timeout_minutes: float = Field(30.0, gt=0, description="how long a process waits for the others before it gives up")


class SweepConfig(Section):
    """What `dist-vpt sweep` tries; `train` does not read it."""

    grid: dict[str, Any] = Field(
        {"optim": {"lr": [1.0, 0.5, 0.25, 0.1, 0.05], "weight_decay": [1e-2, 1e-3, 1e-4, 0.0]}},
        description="recipe keys, each with a list of values: every combination is one trial on train, and the best on "
        "val after its last epoch is chosen (VQT's published grid unless said otherwise)",
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (42, 44, 82, 100, 800), min_length=1, description="the chosen setting is trained on trainval with each of them"
    )
    parallelize: Literal["trials", "batch"] = Field(
        "trials", description="what several processes share: the trials, each on its own, or every batch"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        def check(values: Any, at: str) -> Iterator[str]:
            if isinstance(values, dict) and values:
                for key, inner in values.items():
                    yield from check(inner, f"{at}.{key}")
            elif not isinstance(values, list) or not values:
                yield f"{at} = {values!r}: must be a list with at least one value"
            elif any(isinstance(value, (list, dict)) for value in values) or len(set(values)) < len(values):
                yield f"{at} = {values!r}: must be plain values, each said once"
            if at in ("grid.seed", "grid.sweep", "grid.run", "grid.data.train_on", "grid.train.test"):
                yield f"{at}: is the sweep's own; leave it out"

        mistakes = list(check(self.grid, "grid"))
        if len(set(self.seeds)) < len(self.seeds):
            mistakes.append(f"seeds = {list(self.seeds)}: each once")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


def grid_axes(grid: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The keys of a grid, as ``a.b``, each with its values."""
    for key, value in grid.items():
        path = f"{at}.{key}" if at else key
        if isinstance(value, dict):
            yield from grid_axes(value, path)
        else:
            yield path, value


class Recipe(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, data order, augmentation and dropout")
    data: DataConfig = Field(default_factory=DataConfig, description="task, format and preprocessing")
    backbone: BackboneConfig = Field(default_factory=BackboneConfig, description="the frozen transformer")
    method: MethodConfig = Field(default_factory=VPTConfig, description="what is trained")
    stream: StreamConfig = Field(default_factory=StreamConfig, description="where readers keep the frozen stream")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="optimiser and schedule")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the loop")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="device, precision, memory")
    run: RunConfig = Field(default_factory=RunConfig, description="the run folder")
    sweep: SweepConfig = Field(default_factory=SweepConfig, description="what `dist-vpt sweep` tries")

    @property
    def doubts(self) -> list[str]:
        """What is allowed, and hardly meant."""
        if self.backbone.name == "demo" and self.data.task != "digits":
            letters = "the backbone is demo, which has seen printed letters of 24 px alone"
            return [f"{letters}; others are in configs/backbone and told by `dist-vpt backbones`"]
        return []

    @model_validator(mode="after")
    def _rules(self) -> Self:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.optim.warmup_epochs >= self.train.epochs:
            yield f"optim.warmup_epochs = {self.optim.warmup_epochs}: must be below train.epochs = {self.train.epochs}"
        if self.train.batch_size % self.train.grad_accum_steps:
            yield (
                f"train.grad_accum_steps = {self.train.grad_accum_steps}: must divide train.batch_size = "
                f"{self.train.batch_size}"
            )
        if self.train.early_stop and self.data.train_on == "trainval":
            yield (
                "train.early_stop needs a validation split, and data.train_on = trainval leaves none: "
                "set data.train_on=train or train.early_stop=null"
            )
        method = f"method.name = {self.method.name}"
        if self.stream != StreamConfig() and not self.method.reader:
            yield f"stream: {method} changes the image's tokens, so that no frozen stream is kept; leave stream out"
        if self.backbone.drop_path > 0 and self.method.reader:
            yield (
                f"backbone.drop_path = {self.backbone.drop_path}: {method} trains nothing in the backbone; "
                "set backbone.drop_path=0"
            )
        if self.method.reader:
            for name, unused in (("activation_checkpointing", "none"), ("offload", False)):
                if (value := getattr(self.runtime, name)) != unused:
                    yield (
                        f"runtime.{name} = {value}: {method} keeps nothing of the backbone for backward; leave it out"
                    )
        if self.runtime.quantize == "int8" and self.method.name in ("full", "partial", "vqt"):
            does = "reads the blocks' weights itself" if self.method.name == "vqt" else "trains the blocks' weights"
            yield f"runtime.quantize = int8: {method} {does}; set runtime.quantize=none"
        if self.runtime.compile and self.runtime.activation_checkpointing.startswith("budget"):
            yield (
                f"runtime.compile = true with runtime.activation_checkpointing = "
                f"{self.runtime.activation_checkpointing}: a compiled block does not show the products that a budget "
                "chooses among; use mlp, block or every-N, or compile=false"
            )

    def to_yaml(self) -> str:
        """The resolved recipe, every key spelled out; loading it gives an equal recipe."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=110)


def json_schema() -> dict[str, Any]:
    """A JSON Schema of recipe files, for editors."""
    schema = Recipe.model_json_schema()
    base = {
        "description": "recipe files to inherit from, relative to this one; later ones win, this file over all",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    schema["properties"] = {"base": base, **schema["properties"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
