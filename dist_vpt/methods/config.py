"""The method part of a recipe, one class a method. They need no torch, so that recipes are read in no time."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MethodSettings(BaseModel):
    """What every method's part of the recipe shares."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    reader: ClassVar[bool] = False  # whether it only reads the frozen stream
    reads_blocks: ClassVar[bool] = False  # and that with the weights inside the blocks

    @property
    def frame(self) -> int:
        """Pixels that are put on each side of an image: the backbone is built for images so much larger."""
        return 0


class VPTConfig(MethodSettings):
    """Prompt tokens between the prefix tokens and the patches, shallow or deep, or in another place."""

    name: Literal["vpt"] = Field("vpt", description="Visual Prompt Tuning")
    prompts: int = Field(
        10, ge=1, description="P: prompt tokens of a prompted block; deep, not given: the paper's for a known task"
    )
    location: Literal["prepend", "add", "add-1", "prepend-pixel", "pad", "below"] = Field(
        "prepend",
        description="prepend: tokens before the patches; add: added to the tokens, one to each (prompts is not read); "
        "add-1: one added to all of them; prepend-pixel: patches of trained pixels, embedded and prepended; pad: a "
        "frame of trained pixels around the image, so many wide; below: so many trained channels beside the image's "
        "three, and how patches are embedded from them",
    )
    deep: bool = Field(
        True, description="true: fresh prompts before every prompted block; false: before the first alone"
    )
    layers: int | None = Field(None, ge=1, description="deep: how many blocks are prompted; null: all of them")
    prompted_blocks: Literal["first", "last"] = Field(
        "first", description="deep: whether `layers` counts from the first or the last block"
    )
    expand: bool = Field(
        True, description="deep, first layers: the last prompts flow on through the blocks after; false: they end there"
    )
    shared: bool = Field(False, description="deep: one set of prompts for all prompted blocks after the first of them")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the prompts, drawn for every image")
    projection: int | None = Field(
        None, ge=1, description="d: width of the prompts before a learned d -> D projection; null: none"
    )
    pooling: Literal["original", "img_pool", "prompt_pool", "imgprompt_pool"] = Field(
        "original",
        description="what the head reads: the weights' own pooling, or the mean of patches, prompts or both",
    )
    init: Literal["random", "class_token", "tokens"] = Field(
        "random",
        description="random: uniform, as published; class_token, tokens: besides drawn like the class tokens, or all "
        "tokens, of training images before the block (normal, with their mean and deviation)",
    )
    extra_trainable: tuple[Literal["bias", "cls"], ...] = Field(
        (), description="what is trained beside the prompts, as by the method of that name: all biases, the class token"
    )

    @model_validator(mode="after")
    def _deep_options(self) -> Self:
        if not self.deep and (self.layers is not None or self.shared or self.prompted_blocks != "first"):
            raise ValueError(
                f"deep = false with layers = {self.layers}, prompted_blocks = {self.prompted_blocks}, shared = "
                f"{self.shared}: these belong to deep prompts; set deep=true or leave them out"
            )
        if not self.expand and (self.layers is None or self.prompted_blocks != "first" or self.location != "prepend"):
            raise ValueError(
                f"expand = false with layers = {self.layers}, prompted_blocks = {self.prompted_blocks}, location = "
                f"{self.location}: belongs to prompts prepended to the first layers; set layers or leave it out"
            )
        if self.location in ("prepend-pixel", "pad", "below") and (self.deep or self.projection):
            raise ValueError(
                f"location = {self.location}: there are pixels before the first block alone, and no "
                "projection; set deep=false and projection=null"
            )
        tokens = self.location.startswith("prepend")
        if self.pooling in ("prompt_pool", "imgprompt_pool") and not (tokens and self.expand):
            raise ValueError(
                f"pooling = {self.pooling}: with location = {self.location} and expand = {self.expand} no prompts come "
                "out of the last block; set pooling=original or img_pool"
            )
        if self.init != "random" and (self.location != "prepend" or self.projection):
            raise ValueError(
                f"init = {self.init} with location = {self.location}, projection = {self.projection}: only prompts "
                "that are tokens themselves can be drawn like tokens; set location=prepend and projection=null"
            )
        if len(set(self.extra_trainable)) < len(self.extra_trainable):
            raise ValueError(f"extra_trainable = {list(self.extra_trainable)}: each once; leave the repeated one out")
        return self

    @property
    def frame(self) -> int:
        return self.prompts if self.location == "pad" else 0


class VQTConfig(MethodSettings):
    """Query tokens that read the frozen blocks, and a linear head on what they found."""

    reader: ClassVar[bool] = True
    reads_blocks: ClassVar[bool] = True
    name: Literal["vqt"] = Field("vqt", description="Visual Query Tuning")
    queries: int = Field(1, ge=1, description="Q: query tokens of a block; not given: the paper's for a known task")
    blocks: tuple[int, ...] | None = Field(
        None, min_length=1, description="numbers of the blocks that are read, from 0; null: all of them"
    )
    pooling: Literal["none", "mean", "weighted"] = Field(
        "none", description="of a block's queries: kept side by side, their mean, or a learned weighted sum"
    )
    normalize: bool = Field(True, description="bring each block's features, and the backbone's own, to length 1")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the queries, drawn for every image")
    form: Literal["auto", "absorbed", "projected"] = Field(
        "auto", description="how attention is computed; auto: the one with fewer operations"
    )
    keep: int | None = Field(
        None,
        ge=1,
        description="features that the head reads, which the adapters name (`dist-vpt compress` chooses them); "
        "null: all of them",
    )

    @model_validator(mode="after")
    def _blocks_rise(self) -> Self:
        if self.blocks is not None and (list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0):
            raise ValueError(f"blocks = {list(self.blocks)}: must be rising block numbers from 0; sort them")
        return self


class LinearConfig(MethodSettings):
    """A linear head on frozen features."""

    reader: ClassVar[bool] = True
    name: Literal["linear"] = Field("linear", description="linear probing")


class MLPConfig(MethodSettings):
    """Linear layers with GELU and dropout between them, on frozen features."""

    reader: ClassVar[bool] = True
    name: Literal["mlp"] = Field("mlp", description="a multilayer perceptron as the head")
    layers: int = Field(3, ge=1, description="linear layers; 1 is linear probing")
    width: int | None = Field(None, ge=1, description="of the hidden layers; null: the backbone's width")
    dropout: float = Field(0.0, ge=0, lt=1, description="after each hidden layer")


class SideConfig(MethodSettings):
    """A small convolutional network beside the frozen backbone, and a linear head on the blend of the two."""

    reader: ClassVar[bool] = True
    name: Literal["side"] = Field("side", description="side-tuning")
    layers: int = Field(3, ge=1, description="convolutions, each of which halves the image")
    channels: int = Field(64, ge=1, description="C: channels of each convolution")


class FullConfig(MethodSettings):
    """All weights and a linear head."""

    name: Literal["full"] = Field("full", description="full fine-tuning")


class PartialConfig(MethodSettings):
    """The last blocks, the norms after them, and a linear head."""

    name: Literal["partial"] = Field("partial", description="the last blocks are tuned")
    blocks: int = Field(1, ge=1, description="how many of the last blocks are trained")


class BiasConfig(MethodSettings):
    """All biases of the backbone and a linear head."""

    name: Literal["bias"] = Field("bias", description="BitFit: biases alone")


class ClsConfig(MethodSettings):
    """The class token and a linear head."""

    name: Literal["cls"] = Field("cls", description="the class token is tuned")
    reinit: bool = Field(False, description="true: the token starts anew, near zero; false: as in the weights")


class LoRAConfig(MethodSettings):
    """Low-rank updates of linear layers in every block, and a linear head."""

    name: Literal["lora"] = Field("lora", description="low-rank adaptation")
    rank: int = Field(8, ge=1, description="r: rank of an update")
    alpha: float = Field(8.0, gt=0, description="an update is multiplied by alpha / rank")
    targets: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = Field(
        ("q", "v"),
        min_length=1,
        description="which linear layers: queries, keys, values, attention's output, MLP's two",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on what an update reads")

    @model_validator(mode="after")
    def _targets_once(self) -> Self:
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets = {list(self.targets)}: each once; leave the repeated one out")
        return self


class AdapterConfig(MethodSettings):
    """A bottleneck at the end of a block's branches, and a linear head."""

    name: Literal["adapter"] = Field("adapter", description="serial adapters")
    style: Literal["pfeiffer", "houlsby"] = Field(
        "pfeiffer", description="pfeiffer: after each MLP; houlsby: after each attention, too"
    )
    bottleneck: int = Field(64, ge=1, description="r: width inside an adapter")


class AdaptFormerConfig(MethodSettings):
    """A bottleneck beside each block's MLP, and a linear head."""

    name: Literal["adaptformer"] = Field("adaptformer", description="parallel adapters")
    bottleneck: int = Field(64, ge=1, description="r: width inside an adapter")
    scale: float = Field(0.1, gt=0, description="what an adapter gives is multiplied by it")


class SSFConfig(MethodSettings):
    """A scale and a shift after every operation of the backbone, and a linear head."""

    name: Literal["ssf"] = Field("ssf", description="scaling and shifting features")


MethodConfig = Annotated[
    VPTConfig
    | VQTConfig
    | LinearConfig
    | MLPConfig
    | SideConfig
    | FullConfig
    | PartialConfig
    | BiasConfig
    | ClsConfig
    | LoRAConfig
    | AdapterConfig
    | AdaptFormerConfig
    | SSFConfig,
    Field(discriminator="name"),
]
