"""Settings of Hugging Face datasets."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class HfConfig(BaseModel):
    """Settings of Hugging Face datasets."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    config: str | None = Field(default=None, description="configuration (subset) of a hub dataset; null: its default")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub dataset; null: its newest")
    image: str | None = Field(
        default=None, description="column of the images; null: the only Image column, or the only one of encoded images"
    )
    label: str | None = Field(default=None, description="column of the labels; null: the only ClassLabel column")
    splits: dict[Literal["train", "val", "test"], str] = Field(
        default_factory=dict,
        description="split -> split of the dataset, e.g. {train: 'train[:90%]', val: 'train[90%:]'}; null: "
        "train, validation and test",
    )
