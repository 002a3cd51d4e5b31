"""The method section of a recipe, one class a method. No torch is imported, so that recipes load fast."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

HeadKind = Literal["standardized", "published"]


class MethodSettings(BaseModel):
    """Settings of all methods."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    reader: ClassVar[bool] = False  # only reads the frozen stream
    reads_blocks: ClassVar[bool] = False  # and uses the weights inside the blocks for that
    stacks_layers: ClassVar[bool] = False  # and computes the layers of all trials at once, apart from their modules
    fitted: ClassVar[bool] = False  # a reader that is computed from all features at once, without steps of an optimizer
    head: HeadKind = Field(
        "standardized",
        description="standardized: the head reads features minus their mean over their standard deviation in training "
        "images, and starts at 0, so that training does not depend on the features' scale; published: it reads "
        "features as they are, and starts at random, as in the published code",
    )

    @property
    def frame(self) -> int:
        """Pixels added on each side of an image; the backbone is built for the larger image."""
        return 0


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


class VQTConfig(MethodSettings):
    """Query tokens that read the frozen blocks, and a linear head on their outputs."""

    reader: ClassVar[bool] = True
    reads_blocks: ClassVar[bool] = True
    name: Literal["vqt"] = Field("vqt", description="Visual Query Tuning")
    queries: int = Field(1, ge=1, description="Q: query tokens in a block; not given: the paper's for a known task")
    blocks: tuple[int, ...] | None = Field(
        None, min_length=1, description="numbers of the blocks that are read, from 0; null: all"
    )
    pooling: Literal["none", "mean", "weighted"] = Field(
        "none", description="of a block's queries: concatenated (none), their mean, or a learned weighted sum"
    )
    normalize: bool = Field(True, description="scale features to length 1: each block's, and the backbone's")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate of the queries, 0 to 1, drawn for each image")
    init: Literal["scaled", "random"] = Field(
        "scaled",
        description="scaled: normal, and trained as multiples of the root mean square of the tokens of training images "
        "before the block, so that training does not depend on their scale; random: uniform, as published",
    )
    form: Literal["auto", "absorbed", "projected"] = Field(
        "auto", description="how attention is computed; auto: the one with fewer operations"
    )
    keep: int | None = Field(
        None,
        ge=1,
        description="number of features that the head reads; the adapters list which (`dist-vpt compress` selects "
        "them); null: all",
    )

    @model_validator(mode="after")
    def _blocks_rise(self) -> Self:
        check_blocks_rise(self.blocks)
        return self


class LinearConfig(MethodSettings):
    """A linear head on frozen features."""

    reader: ClassVar[bool] = True
    name: Literal["linear"] = Field("linear", description="linear probing")
    reads: Literal["pooled", "blocks"] = Field(
        "pooled",
        description="the backbone's pooled features, or (blocks) also the class token and mean patch of every block",
    )


class KNNConfig(MethodSettings):
    """The labels of the nearest training images; nothing is trained."""

    reader: ClassVar[bool] = True
    fitted: ClassVar[bool] = True
    name: Literal["knn"] = Field("knn", description="k nearest neighbours by cosine similarity")
    head: HeadKind = Field(
        "standardized",
        description="standardized: similarities of features minus their mean over their standard deviation in training "
        "images; published: of features as they are",
    )
    k: int = Field(20, ge=1, description="number of training images that vote, at most all of them")
    temperature: float | None = Field(
        0.07,
        gt=0,
        description="a vote weighs exp(similarity / temperature), as in DINO's protocol; null: all weigh the same",
    )


class LogisticConfig(MethodSettings):
    """A linear head that is the optimum of a penalized loss on the features of all training images."""

    reader: ClassVar[bool] = True
    fitted: ClassVar[bool] = True
    name: Literal["logistic"] = Field("logistic", description="multinomial logistic regression")
    head: HeadKind = Field(
        "standardized",
        description="standardized: the penalty is of weights of features minus their mean over their standard "
        "deviation in training images; published: of features as they are",
    )
    c: float = Field(
        0.1,
        gt=0,
        description="C: scikit-learn's; the loss, summed over images, has the penalty |weights|^2 / (2 C), so that a "
        "small C is a strong one",
    )


class MLPConfig(MethodSettings):
    """Linear layers with GELU and dropout between them, on frozen features."""

    reader: ClassVar[bool] = True
    name: Literal["mlp"] = Field("mlp", description="a multilayer perceptron as the head")
    layers: int = Field(3, ge=1, description="number of linear layers; 1 is linear probing")
    width: int | None = Field(None, ge=1, description="width of the hidden layers; null: the backbone's")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate after each hidden layer, 0 to 1")


class SideConfig(MethodSettings):
    """A small convolutional network beside the frozen backbone, and a linear head on a blend of both."""

    reader: ClassVar[bool] = True
    name: Literal["side"] = Field("side", description="side-tuning")
    layers: int = Field(3, ge=1, description="number of convolutions, each of which halves the image")
    channels: int = Field(64, ge=1, description="C: channels of each convolution")


class ComboConfig(MethodSettings):
    """A small transformer on the tokens that come out of the frozen blocks, and a linear head on its class token."""

    reader: ClassVar[bool] = True
    stacks_layers: ClassVar[bool] = True
    name: Literal["combo"] = Field("combo", description="a transformer on the patches of all blocks")
    blocks: tuple[int, ...] | None = Field(
        None, min_length=1, description="numbers of the blocks whose outputs are read, from 0; null: all"
    )
    width: int = Field(128, ge=1, description="W: width of the transformer's tokens")
    depth: int = Field(6, ge=1, description="number of the transformer's layers")
    heads: int = Field(2, ge=1, description="attention heads of each layer; they divide the width")
    mlp_ratio: int = Field(1, ge=1, description="width of each layer's MLP, in widths of its tokens")
    grid: int | None = Field(
        None,
        ge=1,
        description="patches on a side, to which the blocks' outputs are resampled (bilinear); null: as they are",
    )
    tokens: Literal["patches", "all"] = Field(
        "patches", description="which tokens are read: patches, or the class token and registers (all) too"
    )
    head_reads: Literal["token", "pooled", "blocks"] = Field(
        "blocks",
        description="the transformer's class token, as published (token); and the backbone's pooled features (pooled); "
        "and the class token and mean patch of each block that is read (blocks)",
    )
    standardize: Literal["channel", "token"] = Field(
        "channel",
        description="zero mean and unit deviation of each channel over training images, or of each token",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout rate of the tokens and of the layers' branches, 0 to 1"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_blocks_rise(self.blocks)
        check_heads_divide(self.width, self.heads, "width")
        return self


class LadderConfig(MethodSettings):
    """A narrow network beside the frozen blocks that reads the output of each, and a linear head."""

    reader: ClassVar[bool] = True
    stacks_layers: ClassVar[bool] = True
    name: Literal["ladder"] = Field("ladder", description="ladder side tuning")
    kind: Literal["lst", "last"] = Field(
        "lst",
        description="lst: narrow transformer layers on a gated sum of each block's output and the layer before; last: "
        "attention of a low rank at the backbone's width, without MLPs",
    )
    reduction: int = Field(8, ge=1, description="lst: the backbone's width over the side network's")
    mlp_ratio: int = Field(4, ge=1, description="lst: width of each layer's MLP, in widths of its tokens")
    rank: int = Field(16, ge=1, description="last: rank of queries, keys and values; the heads divide it")
    heads: int = Field(
        4, ge=1, description="attention heads of each layer; lst: the width is rounded up to a multiple of them"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate of the layers' branches, 0 to 1")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        unread = {"reduction": 8, "mlp_ratio": 4} if self.kind == "last" else {"rank": 16}
        for key, default in unread.items():
            if (value := getattr(self, key)) != default:
                raise ValueError(f"{key} = {value}: kind = {self.kind} does not read it; leave it out")
        if self.kind == "last":
            check_heads_divide(self.rank, self.heads, "rank")
        return self


def check_blocks_rise(blocks: tuple[int, ...] | None) -> None:
    """Raises ValueError unless these are increasing block numbers."""
    if blocks is not None and (list(blocks) != sorted(set(blocks)) or blocks[0] < 0):
        raise ValueError(f"blocks = {list(blocks)}: must be increasing block numbers from 0; sort them")


def check_heads_divide(width: int, heads: int, key: str) -> None:
    """Raises ValueError unless each head has the same part of the width."""
    if width % heads:
        raise ValueError(f"heads = {heads}, {key} = {width}: heads must divide the {key}; choose another number")


class FullConfig(MethodSettings):
    """All weights and a linear head."""

    name: Literal["full"] = Field("full", description="full fine-tuning")


class PartialConfig(MethodSettings):
    """The last blocks, the norms after them, and a linear head."""

    name: Literal["partial"] = Field("partial", description="partial fine-tuning: the last blocks")
    blocks: int = Field(1, ge=1, description="number of last blocks that are trained")


class BiasConfig(MethodSettings):
    """All biases of the backbone and a linear head."""

    name: Literal["bias"] = Field("bias", description="BitFit: only biases")


class ClsConfig(MethodSettings):
    """The class token and a linear head."""

    name: Literal["cls"] = Field("cls", description="class-token tuning")
    reinit: bool = Field(False, description="true: the token starts near zero; false: at its pretrained value")


class LoRAConfig(MethodSettings):
    """Low-rank updates of linear layers in every block, and a linear head."""

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

    name: Literal["adapter"] = Field("adapter", description="serial adapters")
    style: Literal["pfeiffer", "houlsby"] = Field(
        "pfeiffer", description="pfeiffer: after each MLP; houlsby: also after each attention"
    )
    bottleneck: int = Field(64, ge=1, description="r: width inside an adapter")


class AdaptFormerConfig(MethodSettings):
    """A bottleneck beside each block's MLP, and a linear head."""

    name: Literal["adaptformer"] = Field("adaptformer", description="parallel adapters")
    bottleneck: int = Field(64, ge=1, description="r: width inside an adapter")
    scale: float = Field(0.1, gt=0, description="factor of the adapters' outputs")


class SSFConfig(MethodSettings):
    """A scale and a shift after every operation of the backbone, and a linear head."""

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
