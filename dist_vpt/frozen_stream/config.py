"""Where the frozen stream of a reader is kept."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

StreamDtype = Literal["precision", "int8", "fp8"]


class StreamConfig(BaseModel):
    """Where a reader's frozen stream is kept between epochs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    cache: Literal["auto", "none", "device", "memory", "disk"] = Field(
        "auto",
        description="none: computed anew for each batch; device, memory, disk: computed once and kept on the "
        "accelerator, in host memory, or in stream.dir; auto: the first of device, memory and (with stream.dir) disk "
        "that it fits in, else none",
    )
    dtype: StreamDtype = Field(
        "precision",
        description="how tokens are kept in a cache: in runtime.precision, or in 8 bits with a scale for each token "
        "(int8, fp8): half the bytes of bf16; the pooled features stay as they are",
    )
    dir: str | None = Field(None, min_length=1, description="folder of the cache files; they serve later runs too")

    @model_validator(mode="after")
    def _cache_fits(self) -> Self:
        if self.cache == "disk" and self.dir is None:
            raise ValueError("cache = disk: needs a folder for its files; set stream.dir")
        if self.cache == "none" and self.dtype != "precision":
            raise ValueError(
                f"dtype = {self.dtype} with cache = none: only a cache keeps tokens in 8 bits; leave dtype out, or set "
                "another cache"
            )
        return self
