"""The method part of a recipe, one class a method. They need no torch, so that recipes are read in no time."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MethodSettings(BaseModel):
    """What every method's part of the recipe shares."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    reader: ClassVar[bool] = False  # whether it only reads the frozen stream


class VPTRecipe(MethodSettings):
    """Prompt tokens between the prefix tokens and the patches, shallow or deep."""

    name: Literal["vpt"] = Field("vpt", description="Visual Prompt Tuning")
    prompts: int = Field(
        10, ge=1, description="P: prompt tokens of a prompted block; deep, not given: the paper's for a known task"
    )
    deep: bool = Field(
        True, description="true: fresh prompts before every prompted block; false: before the first alone"
    )
    layers: int | None = Field(None, ge=1, description="deep: how many blocks are prompted; null: all of them")
    end: Literal["first", "last"] = Field(
        "first", description="deep: whether `layers` counts from the first or the last block"
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

    @model_validator(mode="after")
    def _deep_options(self) -> Self:
        if not self.deep and (self.layers is not None or self.shared or self.end != "first"):
            raise ValueError(
                f"deep = false with layers = {self.layers}, end = {self.end}, shared = {self.shared}: these belong to "
                "deep prompts; set deep=true or leave them out"
            )
        return self


class VQTRecipe(MethodSettings):
    """Query tokens that read the frozen blocks, and a linear head on what they found."""

    reader: ClassVar[bool] = True
    name: Literal["vqt"] = Field("vqt", description="Visual Query Tuning")
    queries: int = Field(1, ge=1, description="Q: query tokens of a block; not given: the paper's for a known task")
    blocks: tuple[int, ...] | None = Field(
        None, min_length=1, description="numbers of the blocks that are read, from 0; null: all of them"
    )
    pooling: Literal["none", "mean", "weighted"] = Field(
        "none", description="of a block's queries: kept side by side, their mean, or a learned weighted sum"
    )
    normalise: bool = Field(True, description="bring each block's features, and the backbone's own, to length 1")
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


class LinearRecipe(MethodSettings):
    """A linear head on frozen features."""

    reader: ClassVar[bool] = True
    name: Literal["linear"] = Field("linear", description="linear probing")


class MLPRecipe(MethodSettings):
    """Linear layers with GELU and dropout between them, on frozen features."""

    reader: ClassVar[bool] = True
    name: Literal["mlp"] = Field("mlp", description="a multilayer perceptron as the head")
    layers: int = Field(3, ge=1, description="linear layers; 1 is linear probing")
    width: int | None = Field(None, ge=1, description="of the hidden layers; null: the backbone's width")
    dropout: float = Field(0.0, ge=0, lt=1, description="after each hidden layer")


class FullRecipe(MethodSettings):
    """All weights and a linear head."""

    name: Literal["full"] = Field("full", description="full fine-tuning")


MethodRecipe = Annotated[VPTRecipe | VQTRecipe | LinearRecipe | MLPRecipe | FullRecipe, Field(discriminator="name")]
