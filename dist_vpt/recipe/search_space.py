"""What a search draws its trials from: for each recipe key a range of numbers, or a list of values."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

LOG_RATIO = 10  # of the largest and the smallest value of the grid's, from which on a range made of them is logarithmic
OF_A_RANGE = ("low", "high", "log")


class Range(NamedTuple):
    """Numbers from low to high; whole ones where both are whole."""

    low: float
    high: float
    log: bool = False


def space_axes(space: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a space, as ``a.b``, each with its range (a mapping) or its values (a list)."""
    for key, value in space.items():
        path = f"{at}.{key}" if at else key
        if isinstance(value, dict) and value and not set(OF_A_RANGE) & set(value):
            yield from space_axes(value, path)
        else:
            yield path, value


def range_mistake(value: Any) -> str:  # noqa: PLR0911 (a rule each)
    """Why a value is no range and no list of values, with the fix, or ""."""
    if isinstance(value, list):
        plain = value and not any(isinstance(each, (list, dict)) for each in value)
        return "" if plain and len(set(value)) == len(value) else "must be plain values, each given once"
    if not isinstance(value, dict):
        return "must be a range such as {low: 1e-4, high: 1e-1, log: true}, or a list of values"
    if unknown := [key for key in value if key not in OF_A_RANGE]:
        return f"{unknown[0]}: a range has low, high and log alone; leave it out"
    low: Any = value.get("low")
    high: Any = value.get("high")
    log = value.get("log", False)
    if not (_is_number(low) and _is_number(high)):
        return "low and high must be numbers; give both"
    if not isinstance(log, bool):
        return "log must be true or false"
    if low >= high:
        return f"low must be below high; {'swap them' if low > high else 'give a list of values instead'}"
    if log and low <= 0:
        return "log needs a low above 0; raise low, or leave log out"
    return ""


def drawn_from(space: Mapping[str, Any] | None, grid: Mapping[str, Any]) -> dict[str, Range | list[Any]]:
    """Each key with its range or values; without a space, those that the values of the grid span.

    Numbers above 0 become a range from the smallest to the largest, logarithmic from a ratio of LOG_RATIO on; other
    values are chosen among.
    """
    if space is not None:
        return {
            key: value if isinstance(value, list) else Range(value["low"], value["high"], value.get("log", False))
            for key, value in space_axes(space)
        }
    found: dict[str, Range | list[Any]] = {}
    for key, values in space_axes(grid):
        if len(values) > 1 and all(_is_number(value) and value > 0 for value in values):
            low, high = min(values), max(values)
            found[key] = Range(low, high, high / low >= LOG_RATIO)
        else:
            found[key] = values
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
