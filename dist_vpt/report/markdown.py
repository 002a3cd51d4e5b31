"""The report as Markdown."""

import re
from collections.abc import Sequence

from dist_vpt.report.comparison import Table
from dist_vpt.report.legend import LEGEND, MISSING, sources


def markdown(tables: Sequence[Table], warnings: Sequence[str] = ()) -> str:
    """Pipe tables with their notes below."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def marked(text: str, marks: str) -> str:
        return f"{text} <sup>{marks}</sup>" if marks else text

    lines = ["# Results", "", f"{LEGEND} {MISSING} **Bold**: the best local number.", ""]
    lines += [f"- Warning: {_md(warning)}" for warning in warnings] + [""] * bool(warnings)
    for table in tables:
        heads = ["method", "from", "backbone", "seeds", *(_md(column.label) for column in table.columns)]
        lines += [f"## {table.title}", "", line(heads), line(["---"] * 4 + ["--:"] * len(table.columns))]
        for row in table.rows:
            cells = [marked(_md(row.name), row.marks), _md(row.source), _md(row.backbone), row.seeds]
            for cell in row.cells:
                text = cell.number + (f" ± {cell.spread}" if cell.spread else "")
                cells.append(marked(f"**{text}**" if cell.best else text, cell.marks))
            lines.append(line(cells))
        lines += [""] + [f"- {mark}: {_md(note)}" for note, mark in table.notes.items()]
        lines += [f"- {_md(remark)}" for remark in table.remarks]
        lines += [""] * bool(table.notes or table.remarks)
    found = sources(tables)
    if found:
        lines += ["## Published numbers", "", *(f"- {_md(source)}" for source in found), ""]
    return "\n".join(lines)


def _md(text: str) -> str:
    """On one line, with the characters escaped that end a cell or begin a tag."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"([*`\[\]]|\b_|_\b|(?<!\w)_)", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
