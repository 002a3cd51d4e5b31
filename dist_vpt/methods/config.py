"""The method section of a recipe: the classes of the writers, and the choice among all methods.

No torch is imported, so that recipes load fast.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dist_vpt.methods.config_base import MethodSettings
from dist_vpt.methods.config_readers import (
    ComboConfig,
    KNNConfig,
    LadderConfig,
    LinearConfig,
    LogisticConfig,
    MLPConfig,
    SideConfig,
    VQTConfig,
)


class VPTConfig(MethodSettings):
    """Prompts: tokens between the prefix tokens and the patches, shallow or deep, or another location."""

    name: Literal["vpt"] = Field("vpt", description="Visual Prompt Tuning")
    prompts: int = Field(
        10,
        ge=1,
        description="P: prompt tokens in a prompted block; deep, not given: the paper's for a known task",
    )
    location: Literal["prepend", "add", "add-1", "prepend-pixel", "pad", "below"] = Field(
        "prepend",
        description="prepend: tokens before the patches; add: added to the tokens, one to each (prompts is ignored); "
        "add-1: one added to all of them; prepend-pixel: patches of trained pixels, embedded and prepended; pad: a "
        "frame of trained pixels around the image, `prompts` pixels wide; below: `prompts` trained channels beside "
        "the image's three, with a trained embedding",
    )
    deep: bool = Field(True, description="true: new prompts before every prompted block; false: only before the first")
    layers: int | None = Field(None, ge=1, description="deep: number of blocks that are prompted; null: all")
    prompted_blocks: Literal["first", "last"] = Field(
        "first",
        description="deep: whether `layers` counts from the first or the last block; last: there are no prompt tokens "
        "before the first prompted block",
    )
    expand: bool = Field(
        True,
        description="deep, first layers: the last prompts pass through the remaining blocks; false: removed",
    )
    shared: bool = Field(False, description="deep: one set of prompts for all prompted blocks after the first of them")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate of the prompts, 0 to 1, drawn for each image")
    projection: int | None = Field(
        None,
        ge=1,
        description="d: width of the prompts before a learned projection to the backbone's; null: no projection",
    )
    pooling: Literal["original", "img_pool", "prompt_pool", "imgprompt_pool"] = Field(
        "original",
        description="what the head reads: the backbone's pooling (original), or the mean of patches, prompts or both",
    )
    init: Literal["scaled", "random", "class_token", "tokens"] = Field(
        "scaled",
        description="scaled: normal, and trained as multiples of the root mean square of the tokens of training images "
        "before the block, so that training does not depend on their scale (prompts that are pixels or projected: as "
        "random); random: uniform, as published; class_token, tokens: plus a normal draw with the mean and standard "
        "deviation of the class tokens, or of all tokens, of training images before the block",
    )
    extra_trainable: tuple[Literal["bias", "cls"], ...] = Field(
        (),
        description="also trained, as in the method of that name: all biases, the class token",
    )

    @model_validator(mode="after")
    def _deep_options(self) -> Self:
        if not self.deep and (self.layers is not None or self.shared or self.prompted_blocks != "first"):
            raise ValueError(
                f"deep = false with layers = {self.layers}, prompted_blocks = {self.prompted_blocks}, shared = "
                f"{self.shared}: these need deep prompts; set deep=true or leave them out"
            )
        if not self.expand and (self.layers is None or self.prompted_blocks != "first" or self.location != "prepend"):
            raise ValueError(
                f"expand = false with layers = {self.layers}, prompted_blocks = {self.prompted_blocks}, location = "
                f"{self.location}: needs prompts that are prepended to the first layers; set layers or leave it out"
            )
        if self.location in ("prepend-pixel", "pad", "below") and (self.deep or self.projection):
            raise ValueError(
                f"location = {self.location}: there are pixels only before the first block, and no "
                "projection; set deep=false and projection=null"
            )
        tokens = self.location.startswith("prepend")
        if self.pooling in ("prompt_pool", "imgprompt_pool") and not (tokens and self.expand):
            raise ValueError(
                f"pooling = {self.pooling}: with location = {self.location} and expand = {self.expand} no prompts come "
                "out of the last block; set pooling=original or img_pool"
            )
        if self.init in ("class_token", "tokens") and (self.location != "prepend" or self.projection):
            raise ValueError(
                f"init = {self.init} with location = {self.location}, projection = {self.projection}: only prompts "
                "that are tokens can be drawn like tokens; set location=prepend and projection=null"
            )
        if len(set(self.extra_trainable)) < len(self.extra_trainable):
            raise ValueError(f"extra_trainable = {list(self.extra_trainable)}: each only once; remove the repeated one")
        return self

    @property
    def frame(self) -> int:
        return self.prompts if self.location == "pad" else 0

    @property
    def scaled(self) -> bool:
        """Whether prompts are multiples of the tokens' scale."""
        return self.init == "scaled" and self.location in ("prepend", "add", "add-1") and self.projection is None


class FullConfig(MethodSettings):
    """All weights and a linear head."""

    by_layer: ClassVar[bool] = True
    name: Literal["full"] = Field("full", description="full fine-tuning")


class PartialConfig(MethodSettings):
    """The last blocks, the norms after them, and a linear head."""

    by_layer: ClassVar[bool] = True
    name: Literal["partial"] = Field("partial", description="partial fine-tuning: the last blocks")
    blocks: int = Field(1, ge=1, description="number of last blocks that are trained")


class BiasConfig(MethodSettings):
    """All biases of the backbone and a linear head."""

    by_layer: ClassVar[bool] = True
    name: Literal["bias"] = Field("bias", description="BitFit: only biases")


class ClsConfig(MethodSettings):
    """The class token and a linear head."""

    name: Literal["cls"] = Field("cls", description="class-token tuning")
    reinit: bool = Field(False, description="true: the token starts near zero; false: at its pretrained value")


class LoRAConfig(MethodSettings):
    """Low-rank updates of linear layers in every block, and a linear head."""

    by_layer: ClassVar[bool] = True
    name: Literal["lora"] = Field("lora", description="low-rank adaptation")
    rank: int = Field(8, ge=1, description="r: rank of the updates")
    alpha: float = Field(8.0, gt=0, description="an update is multiplied by alpha / rank")
    targets: tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...] = Field(
        ("q", "v"),
        min_length=1,
        description="which linear layers: queries, keys, values, attention's output, MLP's two",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate of the updates' inputs, 0 to 1")

    @model_validator(mode="after")
    def _targets_once(self) -> Self:
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets = {list(self.targets)}: each only once; remove the repeated one")
        return self


class AdapterConfig(MethodSettings):
    """Bottlenecks at the end of a block's branches, and a linear head."""

    by_layer: ClassVar[bool] = True
    name: Literal["adapter"] = Field("adapter", description="serial adapters")
    style: Literal["pfeiffer", "houlsby"] = Field(
        "pfeiffer", description="pfeiffer: after each MLP; houlsby: also after each attention"
    )
    bottleneck: int = Field(64, ge=1, description="r: width inside an adapter")


class AdaptFormerConfig(MethodSettings):
    """A bottleneck beside each block's MLP, and a linear head."""

    by_layer: ClassVar[bool] = True
    name: Literal["adaptformer"] = Field("adaptformer", description="parallel adapters")
    bottleneck: int = Field(64, ge=1, description="r: width inside an adapter")
    scale: float = Field(0.1, gt=0, description="factor of the adapters' outputs")


class SSFConfig(MethodSettings):
    """A scale and a shift after every operation of the backbone, and a linear head."""

    by_layer: ClassVar[bool] = True
    name: Literal["ssf"] = Field("ssf", description="scaling and shifting features")


MethodConfig = Annotated[
    VPTConfig
    | VQTConfig
    | LinearConfig
    | KNNConfig
    | LogisticConfig
    | MLPConfig
    | SideConfig
    | ComboConfig
    | LadderConfig
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
