"""Recipe files merged in order, and where each key was set last."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str | int, ...]  # a key's place: ("optim", "lr")
COMMAND_LINE = "command line"  # where an override was said


@dataclass
class Draft:
    """Plain data merged so far, and where each key was said last."""

    data: dict[str, Any] = field(default_factory=dict)
    said: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def put(self, values: Mapping[str, Any], places: Mapping[KeyPath, str], at: KeyPath = ()) -> None:
        into = self._mapping(at)
        # Another method has other settings: what earlier files said of the old one does not carry over.
        if at == ("method",) and "name" in values and into.get("name", values["name"]) != values["name"]:
            for key in [key for key in into if self.said.get((*at, key)) != COMMAND_LINE]:
                del into[key]
        for key, value in values.items():
            path = (*at, key)
            self.said[path] = places.get(path, places.get(at, ""))
            if isinstance(value, Mapping):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                self.put(value, places, path)
            else:
                into[key] = value

    def _mapping(self, at: KeyPath) -> dict[str, Any]:
        into = self.data
        for key in at:
            into = into[key]  # type: ignore[index]
        return into
