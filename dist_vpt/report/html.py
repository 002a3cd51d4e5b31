"""The report as one HTML page that loads nothing."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from dist_vpt.report.comparison import Table
from dist_vpt.report.figures import figures
from dist_vpt.report.legend import LEGEND, MISSING, groups, sources
from dist_vpt.report.local import LocalResult


def html(tables: Sequence[Table], results: Sequence[LocalResult], warnings: Sequence[str] = ()) -> str:
    """One page that loads nothing."""
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    versions = Counter(
        ", ".join(filter(None, [local.result.device, *(" ".join(item) for item in local.result.versions.items())]))
        for local in results
    )
    return environment.from_string(template).render(
        sections=[
            {
                "table": table,
                "heads": groups(table),
                "figures": figures(table, f"{table.title.split()[0].lower()}"),
            }
            for table in tables
        ],
        results=results,
        versions={machine: count for machine, count in versions.items() if machine},
        warnings=warnings,
        sources=sources(tables),
        legend=f"{LEGEND} {MISSING}",
    )
