"""Settings of WebDataset shards."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dist_vpt.data.config_table import Name


class WebDatasetConfig(BaseModel):
    """Settings of WebDataset shards: tar files whose members of one name are one sample."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    splits: dict[Literal["train", "val", "test"], str] = Field(
        default_factory=dict,
        description="split -> its shards below root, e.g. {train: 'train-*.tar', val: 'val/*.tar'}; null: those with "
        "the split in their name or folder",
    )
    image: str | None = Field(
        default=None, description="extension of a sample's image, such as jpg; null: the only one of an image"
    )
    label: str | None = Field(
        default=None,
        description="where a sample's label is: an extension, such as cls or txt, or json.FIELD; null: cls, or the "
        "only field of json with a usual name of labels",
    )
    classes: tuple[Name, ...] | None = Field(
        default=None,
        min_length=2,
        description="names of the classes in their order; labels are these names, or their numbers from 0; null: the "
        "lines of classes.txt in root, else the labels of train in order",
    )
