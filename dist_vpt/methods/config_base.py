"""The settings that all methods have in common. No torch is imported, so that recipes load fast."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

HeadKind = Literal["standardized", "published"]


class MethodSettings(BaseModel):
    """Settings of all methods."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    reader: ClassVar[bool] = False  # only reads the frozen stream
    reads_blocks: ClassVar[bool] = False  # and uses the weights inside the blocks for that
    stacks_layers: ClassVar[bool] = False  # and computes the layers of all trials at once, apart from their modules
    joins: ClassVar[bool] = False  # a reader of several backbones
    fitted: ClassVar[bool] = False  # a reader that is computed from all features at once, without steps of an optimizer
    by_layer: ClassVar[bool] = False  # trains tensors that belong to single layers of the backbone
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
