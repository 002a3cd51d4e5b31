"""Recipe files merged in order, and where each key was set last."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str | int, ...]  # a key of the recipe: ("optim", "lr")
COMMAND_LINE = "command line"  # the location of an override


@dataclass
class Draft:
    """Plain data merged so far, the location (file and line) at which each key was set last, and mistakes found."""

    data: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    protocol: str = "default"  # published: the section of that name of each file is merged on top of the file

    def merge(self, values: Mapping[str, Any], locations: Mapping[KeyPath, str], at: KeyPath = ()) -> None:
        """Set keys below ``at``; mappings are merged, all other values replaced."""
        target = self._mapping(at)
        # Another method has other settings: those of the previous one are dropped, but for overrides.
        if at == ("method",) and "name" in values and target.get("name", values["name"]) != values["name"]:
            for key in [key for key in target if self.locations.get((*at, key)) != COMMAND_LINE]:
                del target[key]
        for key, value in values.items():
            path = (*at, key)
            self.locations[path] = locations.get(path, locations.get(at, ""))
            if isinstance(value, Mapping):
                if not isinstance(target.get(key), dict):
                    target[key] = {}
                self.merge(value, locations, path)
            else:
                target[key] = value

    def location(self, path: KeyPath) -> str:
        """Where a key, or else the innermost section around it, was set."""
        above = (path[:length] for length in range(len(path), 0, -1))
        return next((found for key in above if (found := self.locations.get(key))), "recipe")

    def _mapping(self, at: KeyPath) -> dict[str, Any]:
        target = self.data
        for key in at:
            target = target[key]  # type: ignore[index]
        return target
