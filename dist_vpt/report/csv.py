"""The report as CSV."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_vpt.data.tasks import TASKS
from dist_vpt.report.comparison import Cell, Column, ResultRow, Table
from dist_vpt.report.local import LocalResult


def csv_text(tables: Sequence[Table]) -> str:
    """A line for each task and row, with everything known about it, in full precision.

    Means have lines only in published rows that consist of them: their task is empty, and ``mean`` says which it is.
    """
    lines = []
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                if _has_line(column, row, cell):
                    facts = {
                        "table": table.title,
                        "group": TASKS[column.task].group if column.task in TASKS else None,
                        "task": column.task,
                        "mean": "" if column.task else column.label,
                        "method": row.method,
                        "detail": row.detail,
                        "source": row.source,
                        "backbone": row.backbone,
                        "status": "published" if row.published else "ok" if cell.mean is not None else "failed",
                        f"{_metric(column, row)}_mean": cell.mean,
                        "notes": "; ".join([*row.notes, *cell.notes]),
                    }
                    lines.append(facts | (_facts(row.local[column.task]) if row.local else {}))
    written = io.StringIO()
    names = dict.fromkeys(name for facts in lines for name in facts)
    writer = csv.DictWriter(written, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


def _metric(column: Column, row: ResultRow) -> str:
    """The name of a cell's score."""
    local = row.local.get(column.task)
    return local.result.metric if local is not None and local.result.scored else "top1"


def _has_line(column: Column, row: ResultRow, cell: Cell) -> bool:
    if row.local:
        return column.task in row.local
    return bool(column.task) == bool(row.means) and cell.mean is not None


def _facts(local: LocalResult) -> dict[str, Any]:
    """A result, flat."""
    result = local.result
    facts: dict[str, Any] = {"precision": result.precision, "seeds": _joined(result.seeds)}
    for score, spread in sorted(result.test.items(), key=lambda item: (item[0] != result.metric, item[0])):
        facts |= {
            f"{score}_mean": spread.mean,
            f"{score}_std": spread.std,
            f"{score}_values": _joined(spread.values),
            f"{score}_n": len(spread.values),
        }
    protocol = result.protocol.model_dump() if result.protocol else {}
    counts, notes = protocol.pop("counts", {}), protocol.pop("notes", ())
    facts |= {f"val_{name}": value for name, value in result.val.items()}
    facts |= {f"epoch_{name}": value for name, value in result.epochs.items()}
    facts |= protocol | {f"images_{name}": count for name, count in counts.items()}
    facts |= {"protocol_notes": "; ".join(notes), "chosen": json.dumps(result.chosen)}
    facts |= {"seconds": result.seconds, "peak_memory_mib": result.peak_memory_mib}
    if result.parameters:
        facts |= {"trained_parameters": result.parameters.trained, "total_parameters": result.parameters.total}
    facts |= {"device": result.device, "versions": json.dumps(result.versions), "finished": result.finished}
    return facts | {"run": result.run, "folder": str(Path(local.folder, result.folder)), "failed": result.failed}


def _joined(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))
