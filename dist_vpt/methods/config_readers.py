"""The method section of a recipe for readers, one class a method. No torch is imported, so that recipes load fast."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dist_vpt.methods.config_base import HeadKind, MethodSettings


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
    joins: ClassVar[bool] = True
    name: Literal["linear"] = Field("linear", description="linear probing")
    reads: Literal["pooled", "blocks"] = Field(
        "pooled",
        description="the backbone's pooled features, or (blocks) also the class token and mean patch of every block",
    )


class KNNConfig(MethodSettings):
    """The labels of the nearest training images; nothing is trained."""

    reader: ClassVar[bool] = True
    joins: ClassVar[bool] = True
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
    joins: ClassVar[bool] = True
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
    joins: ClassVar[bool] = True
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
    joins: ClassVar[bool] = True
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
    sum_blocks: bool = Field(
        False,
        description="true: the blocks' outputs are summed, each token with zero mean and unit deviation, and the sum "
        "is read as that of one block: a cache keeps one map of tokens for an image in place of one for each block",
    )
    group_penalty: float = Field(
        0.0,
        ge=0,
        description="with several backbones: added to the loss is this number times the norm of each backbone's part "
        "of the projection, summed over backbones (published: 0.01), so that parts of little use become small",
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
