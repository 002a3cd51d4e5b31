"""Results of the user's runs: which of them are shown, which share a row, and what their protocols differ in."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dist_vpt.data.tasks import TASKS
from dist_vpt.runs.results import Protocol, Result

# Protocol of all published numbers shown, besides the settings in data/tasks.py.
PUBLISHED_EPOCHS, PUBLISHED_SIZE = 100, 224
ABSENT = "\u2013"  # en dash
NAMES = {"image_size": "image size", "position_resize": "positions resampled as", "storage": "images from"}


class LocalResult(NamedTuple):
    """A result of the user's runs, and the folder of the file that holds it."""

    folder: str
    result: Result


def extra_results(local: LocalResult) -> list[LocalResult]:
    """A result for each of its extra tests, as if that were a task; of several sets under one name, their mean."""
    result, found = local.result, []
    for name, scores in result.extra_tests.items():
        if "/" not in name:
            changed = {"task": f"{result.task}: {name}", "group": None, "test": scores, "extra_tests": {}}
            found.append(LocalResult(local.folder, result.model_copy(update=changed)))
    return found


def newest(results: Sequence[LocalResult]) -> tuple[list[LocalResult], list[str]]:
    """Keep the newest result per cell and file, scores before failures; return remarks on the others.

    A failure is left out if there is a number under its protocol.
    """
    kept: list[LocalResult] = []
    remarks = []
    for local in sorted(results, key=lambda local: (local.result.scored, local.result.finished))[::-1]:
        rivals = [other for other in kept if _same_cell(local, other) and not _unlike(local, other)]
        if local.result.scored and any(other.folder == local.folder for other in rivals):
            remarks.append(
                f"{local.result.task}, {local.result.method}: run {local.result.run} in {local.folder} is not shown, "
                "as one of another recipe finished later"
            )
        elif local.result.scored or not rivals:
            kept.append(local)
    return [local for local in results if any(local is other for other in kept)], remarks


def _same_cell(one: LocalResult, other: LocalResult) -> bool:
    return one.result.task == other.result.task and _group(one) == _group(other)


def _group(local: LocalResult) -> tuple[str, str, str]:
    return local.result.method, local.result.backbone, local.result.precision


def _unlike(one: LocalResult, other: LocalResult) -> list[str]:
    """Fields in which the protocols differ, notes excepted. A failure without a protocol differs from none."""
    if one.result.protocol is None or other.result.protocol is None:
        return []
    return [name for name in one.result.protocol.differs(other.result.protocol) if name != "notes"]


def local_rows(results: Sequence[LocalResult]) -> Iterator[tuple[str, list[LocalResult]]]:
    """Rows by method, backbone, precision, then protocol and file, as few as possible, each with a task only once.

    With each row comes what tells it from the others of its method and backbone.
    """
    for method, backbone in dict.fromkeys(_group(local)[:2] for local in results):
        rows: list[list[LocalResult]] = []
        for group in dict.fromkeys(_group(local) for local in results if _group(local)[:2] == (method, backbone)):
            rows += _packed([local for local in results if _group(local) == group])
        yield from zip(_details([row[0] for row in rows]), rows, strict=True)


def _packed(results: Sequence[LocalResult]) -> list[list[LocalResult]]:
    """Groups by protocol and file; smaller ones then join a row that has none of their tasks."""
    groups: list[list[LocalResult]] = []
    for local in sorted(results, key=lambda local: local.result.protocol is None):
        for group in groups:
            if group[0].folder == local.folder and not _unlike(group[0], local):
                group.append(local)
                break
        else:
            groups.append([local])
    rows: list[list[LocalResult]] = []
    for group in sorted(groups, key=_weight, reverse=True):
        tasks = {local.result.task for local in group}
        free = [row for row in rows if tasks.isdisjoint(local.result.task for local in row)]
        free = [row for row in free if _shots(row[0]) == _shots(group[0])]  # which name a row
        if free:
            min(free, key=lambda row: len(_unlike(row[0], group[0]))).extend(group)
        else:
            rows.append(group)
    return rows


def _shots(local: LocalResult) -> str:
    """The images of a class, and "" for all of them."""
    shots = local.result.protocol.shots if local.result.protocol else None
    return "1 shot" if shots == 1 else f"{shots} shots" if shots else ""


def _weight(results: Sequence[LocalResult]) -> tuple[bool, int]:
    """Sort key of groups of results: those without a protocol last, more scores first."""
    return results[0].result.protocol is not None, sum(local.result.scored for local in results)


def _details(firsts: Sequence[LocalResult]) -> list[str]:
    """Labels that tell rows of one method and backbone apart: precision, protocol, or else the folder."""
    protocols = [local.result.protocol for local in firsts]
    fields = dict.fromkeys(name for local in firsts for name in _unlike(firsts[0], local) if name != "shots")
    precise = len({local.result.precision for local in firsts}) > 1
    details = [
        ", ".join(
            ([_shots(local)] if _shots(local) else [])
            + ([local.result.precision] if precise else [])
            + [f"{_name(name)} {_value(each, name)}" for name in fields]
        )
        for local, each in zip(firsts, protocols, strict=True)
    ]
    if len(set(details)) == len(details):
        return details
    return [", ".join(filter(None, (detail, local.folder))) for detail, local in zip(details, firsts, strict=True)]


def notes(local: LocalResult, first: LocalResult) -> list[str]:
    """What makes a result differ from published ones and from the rest of its row, whose first one gives the rule."""
    protocol_notes = local.result.protocol.notes if local.result.protocol else ()
    return [*_unpublished(local.result), *protocol_notes, *_unlike_row(local, first)]


def _expected(task: str) -> dict[str, str | int | None]:
    """The protocol of a task's published numbers; nothing for a task that has none."""
    row = TASKS.get(task)
    if row is None or row.group is None:
        return {}
    return {
        "settings": "published",
        "storage": row.format,
        "resize": row.interpolation,
        "fit": row.crop_mode,
        "augment": row.augment,
        "normalize": row.normalize,
        "exif": row.exif,
        "background": row.background,
        "test_crops": 1,
        "extras": "none",
        "fraction": "1.0",
        "shots": "all images",
        "carved": "none",
        "image_size": PUBLISHED_SIZE,
        "epochs": PUBLISHED_EPOCHS,
        "search": "grid",
    }


def _unpublished(result: Result) -> Iterator[str]:
    """Notes on differences from the protocol of the task's published numbers."""
    protocol = result.protocol
    assert protocol is not None  # the result is scored
    for name, wanted in _expected(result.task).items():
        if _value(protocol, name) != str(wanted):
            yield f"not as published: {_name(name)} {_value(protocol, name)}, not {wanted}"
    for split, count in TASKS[result.task].expected_counts if result.task in TASKS else ():
        found = protocol.counts.get(split)
        if found is not None and found != count:
            yield f"not as published: {found:,} images in {split}, not {count:,}"


def _unlike_row(local: LocalResult, first: LocalResult) -> Iterator[str]:
    """Notes on differences from the row's protocol that _unpublished does not report."""
    expected = _expected(local.result.task)
    for name in _unlike(local, first):
        value, usual = _value(local.result.protocol, name), _value(first.result.protocol, name)
        if usual != str(expected.get(name)):
            yield f"unlike the rest of the row: {_name(name)} {value}, not {usual}"


def _name(field_name: str) -> str:
    return NAMES.get(field_name, field_name)


def _value(protocol: Protocol | None, name: str) -> str:
    value = str(getattr(protocol, name, ABSENT))
    if name == "shots" and value == "None":
        return "all images"
    if name in ("carved", "extras"):
        return ", ".join(getattr(protocol, name, ())) or "none"
    return value.partition(" ")[0] if name == "storage" else value  # without its version
