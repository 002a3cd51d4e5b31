"""The backbone section of a recipe."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dist_vpt.backbones.weights.zoo import has_learned_positions
from dist_vpt.errors import Interrupted, UserError, WeightsError

PositionResize = Literal["timm", "vpt"]


class BackboneConfig(BaseModel):
    """A frozen timm transformer and where its weights come from."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(
        "demo",
        description="a short name of `dist-vpt backbones`, a timm model name (a ViT, an Eva or a Swin), or 'demo', "
        "the small ViT in this package",
    )
    weights: str = Field(
        "pretrained",
        min_length=1,
        description="'pretrained' (timm's, from the hub; for demo the file in this package), 'random', or a file: "
        ".safetensors, .pth/.pth.tar/.pt/.bin (no pickled code) or .npz (JAX)",
    )
    entry: str | None = Field(
        None,
        description="which model of a weights file that holds several, such as teacher or model_ema; null: state_dict, "
        "model, teacher, model_ema, ema, student, visual, the first that there is",
    )
    load: Literal["strict", "lenient"] = Field(
        "strict",
        description="strict: every tensor of the model comes from the file and none is left over; lenient: "
        "differences are printed, and what was loaded is checked against the file",
    )
    global_pool: Literal["token", "avg"] | None = Field(
        None,
        description="what method.pooling = original means: class token or mean of the patches; null: as in pretraining",
    )
    position_resize: PositionResize | None = Field(
        None,
        description="how a ViT's learned positions are resampled to another image size than the weights': timm: "
        "bicubic with antialiasing (of .npz: bilinear); vpt: bilinear with aligned corners, as in the published code "
        "of VPT and VQT; null: timm",
    )
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="stochastic depth rate of the last block, 0 to 1; above 0 the blocks are in train mode",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.entry is not None and self.file is None:
            raise ValueError(f"entry = {self.entry}: weights = {self.weights} are one model; remove entry")
        if self.position_resize is not None and not has_learned_positions(self.name):
            raise ValueError(
                f"position_resize = {self.position_resize}: name = {self.name} has no learned positions, so none are "
                "resampled; leave it out"
            )
        return self

    @property
    def positions(self) -> PositionResize:
        """How positions are resampled: what ``position_resize`` comes to. The only place that knows the default."""
        return self.position_resize or "timm"

    @property
    def file(self) -> Path | None:
        """The weights' file, unless they are timm's or random."""
        return None if self.weights in ("pretrained", "random") else Path(os.path.expanduser(self.weights))


class MemberConfig(BackboneConfig):
    """One of several backbones."""

    image_size: int | None = Field(
        None,
        ge=8,
        le=4096,
        description="pixels on a side of its images; null: data.image_size, else that of its recipe or its weights",
    )


def require_file(path: Path) -> None:
    """Raises WeightsError where there is no such file."""
    if re.match(r"\w{2,}:/", str(path)):
        raise WeightsError(f"backbone.weights {str(path)!r}: an address; download the file and name it")
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such weights file; give backbone.weights an existing .safetensors, .pth or .npz"
        )


@contextmanager
def naming_member(members: Sequence[BackboneConfig], number: int) -> Iterator[None]:
    """Say in a UserError which of several backbones it is about, by the keys of its entry. ``number``: from 0."""
    try:
        yield
    except UserError as error:
        if len(members) > 1 and not isinstance(error, Interrupted):
            keys = "|".join(BackboneConfig.model_fields)
            text = re.sub(rf"\b(?:backbone\.(?=(?:{keys})\b)|data\.(?=image_size\b))", "", str(error))
            error.args = (f"backbones[{number}] ({members[number].name}): {text}",)
        raise
