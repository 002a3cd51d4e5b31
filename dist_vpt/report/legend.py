"""Texts shared by all report formats: the meaning of the numbers and the sources of published ones."""

from collections.abc import Sequence

from dist_vpt.report.comparison import Table
from dist_vpt.report.local import ABSENT
from dist_vpt.report.published import Published

LEGEND = "Top-1 accuracy on the test split in percent: mean ± standard deviation (n - 1) over seeds."
MISSING = f"{ABSENT}: no result. n/m: n of the m tasks have a result; a mean needs all of them."


def sources(tables: Sequence[Table]) -> list[str]:
    """Sources of the published rows that are shown, and how they were checked."""
    rows = [row.published for table in tables for row in table.rows if row.published]
    return list(dict.fromkeys(f"{row.label}: {row.source}. Status: {_status(row)}" for row in rows))


def _status(row: Published) -> str:
    return row.status if row.verified else f"unverified, {row.status}"


def groups(table: Table) -> list[tuple[str, int]]:
    """The headings above the columns, and how many columns each spans."""
    found = [column.group for column in table.columns]
    return [(group, found.count(group)) for group in dict.fromkeys(found)]
