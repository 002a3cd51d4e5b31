"""Published numbers, with where they come from and how far they can be trusted: published.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """One method's row of a published table."""

    method: str  # what the method is called here
    name: str  # what its authors call it
    label: str  # short citation
    source: str
    status: str  # how the numbers were checked
    verified: bool
    differs: str  # differences from the protocol of the task's paper; empty: none
    backbone: str
    top1: dict[str, float]  # by task, percent; empty where group means alone are known
    trained: float | None  # parameters without the head; none: not published
    groups: dict[str, float] = field(default_factory=dict)  # by group, and "mean" of groups; empty where top1 is not

    @property
    def notes(self) -> list[str]:
        """Caveats for a comparison with the row."""
        notes = [] if self.verified else [f"unverified ({self.label}): {self.status}"]
        return notes + ([f"protocol differs ({self.label}): {self.differs}"] if self.differs else [])


def published() -> list[Published]:
    """All rows, in the file's order."""
    rows = []
    for table in json.loads(FILE.read_text(encoding="utf-8"))["tables"]:
        facts = {key: table[key] for key in ("label", "source", "status", "verified", "differs", "backbone")}
        kind = "top1" if "rows" in table else "groups"
        for name, numbers in table["rows" if kind == "top1" else "group_means"].items():
            millions = table["trained_millions"].get(name)
            trained = None if millions is None else 1e6 * millions
            method = table["methods"].get(name, name)
            rows.append(Published(method=method, name=name, trained=trained, **facts, **{"top1": {}, kind: numbers}))
    return rows
