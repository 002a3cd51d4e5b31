"""Settings of tables of image paths and labels."""

import codecs
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Delimiter = Literal["comma", "semicolon", "tab", "pipe"]
Separator = Literal["semicolon", "pipe", "comma", "space"]


def _text(value: Any) -> Any:
    """Numbers as text: YAML reads the class 7 as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _encoding(value: str) -> str:
    try:
        known = codecs.lookup(value)._is_text_encoding
    except LookupError:
        known = False
    if not known:
        raise ValueError(f"{value!r}: is no encoding of text that Python knows; use utf-8, latin-1, cp1252 or utf-16")
    return value


Name = Annotated[str, BeforeValidator(_text)]
Encoding = Annotated[str, AfterValidator(_encoding)]


class TableConfig(BaseModel):
    """Settings of tables (CSV, TSV, Parquet) of image paths and labels."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image: str | None = Field(
        default=None,
        description="column of the images' paths; null: found by its usual names, such as image, path or filename",
    )
    label: str | None = Field(
        default=None, description="column of the labels; null: found by its usual names, such as label, class or target"
    )
    labels: tuple[Name, ...] | None = Field(
        default=None,
        min_length=2,
        description="with data.labels: multiple: columns of 0 and 1, one for each class; null: the column of the "
        "labels, or where there is none all columns but image and split",
    )
    separator: Separator | None = Field(
        default=None,
        description="with data.labels: multiple: what separates the labels of an image in their column; null: a "
        "semicolon or pipe, where a label has one; an image may also have a row for each label",
    )
    split: str | None = Field(
        default=None,
        description="column that says which split an image is in; none: there is no such column; null: found by its "
        "usual names, such as split, set or fold",
    )
    splits: dict[Literal["train", "val", "test"], Name] = Field(
        default_factory=dict,
        description="split -> its value in that column, or the file of data.root that holds it, e.g. "
        "{train: Training, test: PrivateTest}; other rows are not used; null: by their usual names",
    )
    images: str | None = Field(
        default=None,
        description="folder in which the paths begin, relative to the table's folder; null: that folder, or images in "
        "it; /: absolute paths",
    )
    suffix: str | None = Field(
        default=None, description="what the paths lack at their end, such as .jpg; null: nothing"
    )
    classes: tuple[Name, ...] | None = Field(
        default=None,
        min_length=2,
        description="names of the classes in their order; labels are these names, or their numbers from 0; null: the "
        "lines of classes.txt beside the table, else the labels of train in order",
    )
    delimiter: Delimiter | None = Field(
        default=None, description="what separates the columns of a text; null: what its first line has most of"
    )
    encoding: Encoding | None = Field(
        default=None, description="of a text, such as latin-1; null: utf-8, or what its byte order mark says"
    )
