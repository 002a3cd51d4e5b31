"""What the sections of a recipe are made of: their base class, and fields whose rule pydantic cannot say by itself."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

POLICY = re.compile(r"^(none|mlp|block|every-[1-9][0-9]*|budget-0\.[0-9]*[1-9][0-9]*)$")


def _policy(value: str) -> str:
    if not POLICY.match(value):
        raise ValueError(f"{value!r}: must be none, mlp, block, every-N (such as every-2) or budget-F (budget-0.5)")
    return value


Policy = Annotated[str, AfterValidator(_policy), Field(json_schema_extra={"pattern": POLICY.pattern})]


def or_null(schema: dict[str, Any]) -> None:
    """Recipe files may have null here; it is filled in before the recipe is checked."""
    number = {key: schema.pop(key) for key in ("type", "minimum") if key in schema}
    schema["anyOf"] = [number, {"type": "null"}]


class Section(BaseModel):
    """A section of the recipe: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
