"""Results next to published numbers: on the terminal, and as Markdown, CSV, LaTeX and one HTML page."""

import csv
import io
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from dist_vpt.data.tasks import TASKS
from dist_vpt.errors import UserError
from dist_vpt.report.comparison import ABSENT, Cell, Own, Row, Table, compare, scored
from dist_vpt.report.published import Published, published
from dist_vpt.runs.results import FILE, identity, read

LEGEND = "Top-1 accuracy on the test split in percent: mean ± standard deviation (n - 1) over seeds."
MISSING = f"{ABSENT}: not there. n/m: a mean is shown where all m tasks are there, and n are."


def report(folders: Sequence[str], out: str | None = None, *, with_published: bool = True) -> list[Table]:
    """Show the tables of all results in and below folders; with ``out``, write report.md, .csv, .tex and .html there.

    Lines that cannot be read are told on stderr. Raises UserError for a folder without results.
    """
    results, warnings = gather(folders)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    rows = published() if with_published else []
    tables = compare(results, rows)
    show(tables, Console())
    if out is not None:
        from dist_vpt.files import write_atomically  # brings torch

        folder = Path(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for ending, text in forms(tables, results, warnings).items():
                write_atomically(folder / f"report.{ending}", text)
                print(folder / f"report.{ending}")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
    return tables


def forms(tables: Sequence[Table], results: Sequence[Own], warnings: Sequence[str]) -> dict[str, str]:
    """The written forms by file ending."""
    return {
        "md": markdown(tables, warnings),
        "csv": csv_lines(tables),
        "tex": latex(tables),
        "html": html(tables, results, warnings),
    }


def gather(folders: Sequence[str]) -> tuple[list[Own], list[str]]:
    """Results of all files in and below folders, the newest of a recipe, and what is wrong with other lines.

    Raises UserError where a folder has none, for all such folders at once.
    """
    files: dict[Path, Path] = {}
    mistakes = []
    for folder in map(Path, folders):
        found = [folder] if folder.is_file() else sorted(folder.rglob(FILE))
        if not folder.exists():
            mistakes.append(f"{folder}: there is no such folder; name one with a {FILE} in it or below it")
        elif not found:
            mistakes.append(f"{folder}: no {FILE} in it or below it; name the folder of a suite")
        for file in found:
            files.setdefault(file.resolve(), file)
    if mistakes:
        raise UserError("\n  ".join(mistakes))
    newest: dict[tuple[str, ...], Own] = {}
    warnings = []
    for file in files.values():
        results, wrong = read(file)
        warnings += wrong
        for result in results:
            key = identity(result)
            if key not in newest or newest[key].result.finished <= result.finished:
                newest[key] = Own(str(file.parent), result)
                if len(key) > 4:
                    newest.pop(key[:4], None)  # a failure, which tells no storage
    if not newest:
        raise UserError(
            "\n  ".join([f"{', '.join(folders)}: no results yet; wait for the first task of the suite", *warnings])
        )
    return list(newest.values()), warnings


def show(tables: Sequence[Table], console: Console) -> None:
    """Tasks in rows, so that a terminal has room for them; as many methods side by side as fit."""
    say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    for table in tables:
        texts = [[_plain(cell) for cell in row.cells] for row in table.rows]
        labels = [column.label for column in table.columns]
        width = max(12, *(len(text) for column in texts for text in column))
        block = max(1, (console.width - max(map(len, labels)) - 4) // (width + 3))
        for start in range(0, len(table.rows), block):
            shown = RichTable(title=f"{table.title}: test top-1, %")
            shown.add_column("task", no_wrap=True)
            rows = table.rows[start : start + block]
            for row in rows:
                heading = Text(row.name + (f" {row.marks}" if row.marks else ""))
                shown.add_column(heading, justify="right", width=width, overflow="fold")
            shown.add_row("from", *(Text(row.source) for row in rows))
            shown.add_row("backbone", *(Text(row.backbone) for row in rows))
            shown.add_row("seeds", *(row.seeds for row in rows), end_section=True)
            for index, column in enumerate(table.columns):
                last = table.columns[index + 1 : index + 2]
                ends = bool(last) and last[0].group != column.group
                cells = [
                    Text(texts[at][index], "bold" if row.cells[index].best else "") for at, row in _at(rows, start)
                ]
                shown.add_row(Text(labels[index]), *cells, end_section=ends)
            console.print(shown)
        for note, mark in table.notes.items():
            say(f"{mark}  {note}")
        for remark in table.remarks:
            say(remark)
    say(f"{LEGEND} {MISSING}")


def _at(rows: Sequence[Row], start: int) -> list[tuple[int, Row]]:
    return list(enumerate(rows, start=start))


def _plain(cell: Cell) -> str:
    return cell.number + (f" ± {cell.spread}" if cell.spread else "") + (f" {cell.marks}" if cell.marks else "")


def markdown(tables: Sequence[Table], warnings: Sequence[str] = ()) -> str:
    """Pipe tables with their notes below."""

    def line(words: Sequence[str]) -> str:
        return f"| {' | '.join(words)} |"

    def marked(text: str, marks: str) -> str:
        return f"{text} <sup>{marks}</sup>" if marks else text

    lines = ["# Results", "", f"{LEGEND} {MISSING} **Bold**: the best own number.", ""]
    lines += [f"- Warning: {_md(warning)}" for warning in warnings] + [""] * bool(warnings)
    for table in tables:
        heads = ["method", "from", "backbone", "seeds", *(_md(column.label) for column in table.columns)]
        lines += [f"## {table.title}", "", line(heads), line(["---"] * 4 + ["--:"] * len(table.columns))]
        for row in table.rows:
            words = [marked(_md(row.name), row.marks), _md(row.source), _md(row.backbone), row.seeds]
            for cell in row.cells:
                text = cell.number + (f" ± {cell.spread}" if cell.spread else "")
                words.append(marked(f"**{text}**" if cell.best else text, cell.marks))
            lines.append(line(words))
        lines += [""] + [f"- {mark}: {_md(note)}" for note, mark in table.notes.items()]
        lines += [f"- {_md(remark)}" for remark in table.remarks]
        lines += [""] * bool(table.notes or table.remarks)
    found = sources(tables)
    if found:
        lines += ["## Published numbers", "", *(f"- {_md(source)}" for source in found), ""]
    return "\n".join(lines)


def _md(text: str) -> str:
    """On one line, without a cell's end or a tag in it."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"([*`\[\]]|\b_|_\b|(?<!\w)_)", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def sources(tables: Sequence[Table]) -> list[str]:
    """Where the published rows that are shown come from, and how they were checked."""
    rows = [row.published for table in tables for row in table.rows if row.published]
    return list(dict.fromkeys(f"{row.label}: {row.source}. Status: {_status(row)}" for row in rows))


def _status(row: Published) -> str:
    return row.status if row.verified else f"unverified, {row.status}"


def csv_lines(tables: Sequence[Table]) -> str:
    """A line for each task and row, with everything there is to know of it, in full precision."""
    lines = []
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                if column.task and (row.published or column.task in row.own):
                    facts = {
                        "table": table.title,
                        "group": TASKS[column.task].group if column.task in TASKS else None,
                        "task": column.task,
                        "method": row.method,
                        "detail": row.detail,
                        "source": row.source,
                        "backbone": row.backbone,
                        "status": "published" if row.published else "ok" if cell.mean is not None else "failed",
                        "top1_mean": cell.mean,
                        "notes": "; ".join([*row.notes, *cell.notes]),
                    }
                    lines.append(facts | (_facts(row.own[column.task]) if row.own else {}))
    written = io.StringIO()
    names = dict.fromkeys(name for facts in lines for name in facts)
    writer = csv.DictWriter(written, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


def _facts(own: Own) -> dict[str, Any]:
    """A result, flat."""
    result = own.result
    facts: dict[str, Any] = {"precision": result.precision, "seeds": _words(result.seeds)}
    for score, spread in sorted(result.test.items(), key=lambda item: (item[0] != "top1", item[0])):
        facts |= {
            f"{score}_mean": spread.mean,
            f"{score}_std": spread.std,
            f"{score}_values": _words(spread.values),
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
    return facts | {"run": result.run, "folder": str(Path(own.place, result.folder)), "failed": result.failed}


def _words(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


def latex(tables: Sequence[Table]) -> str:
    r"""Tables to ``\input`` where booktabs and graphicx are loaded."""
    lines = [r"% \usepackage{booktabs,graphicx}"]
    for table in tables:
        heads = [(group, [c.group for c in table.columns].count(group)) for group in _groups(table)]
        first, rules = 5, []
        for _, count in heads:
            rules.append(rf"\cmidrule(lr){{{first}-{first + count - 1}}}")
            first += count
        lines += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(f'{table.title}. {LEGEND} {MISSING}')}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{llll{'r' * len(table.columns)}}}",
            r"\toprule",
            " & & & & " + " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{_tex(group)}}}" for group, n in heads) + r" \\",
            "".join(rules),
            "method & from & backbone & seeds & "
            + " & ".join(rf"\rotatebox{{90}}{{{_tex(column.label)}}}" for column in table.columns)
            + r" \\",
            r"\midrule",
        ]
        for row in table.rows:
            words = [_tex(row.name) + _raised(row.marks), *map(_tex, (row.source, row.backbone, row.seeds))]
            for cell in row.cells:
                number = rf"\textbf{{{cell.number}}}" if cell.best else _tex(cell.number)
                words.append(number + (rf"{{\tiny$\pm${cell.spread}}}" if cell.spread else "") + _raised(cell.marks))
            lines.append(" & ".join(words) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}", r"\par\raggedright\footnotesize"]
        lines += [rf"{_raised(mark)}~{_tex(note)}.\par" for note, mark in table.notes.items()]
        lines += [rf"{_tex(remark)}\par" for remark in (*table.remarks, *sources([table]))]
        lines += [r"\end{table}"]
    return "\n".join(lines) + "\n"


def _groups(table: Table) -> list[str]:
    return list(dict.fromkeys(column.group for column in table.columns))


def _raised(marks: str) -> str:
    return rf"\textsuperscript{{{marks}}}" if marks else ""


def _tex(text: str) -> str:
    """Letters that every LaTeX knows."""
    known = {char: f"\\{char}" for char in "&%$#_{}"} | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        ABSENT: "--",
    }
    written = []
    for char in " ".join(text.split()):
        plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode() or "?"
        written.append(known.get(char) or (char if char.isascii() else plain))
    return "".join(written)


def html(tables: Sequence[Table], results: Sequence[Own], warnings: Sequence[str] = ()) -> str:
    """One page that loads nothing."""
    from jinja2 import Environment, StrictUndefined

    from dist_vpt.report.figures import figures

    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    versions: dict[str, int] = {}
    for own in results:
        words = [own.result.device, *(f"{name} {version}" for name, version in own.result.versions.items())]
        versions[", ".join(filter(None, words))] = versions.get(", ".join(filter(None, words)), 0) + 1
    return environment.from_string(template).render(
        sections=[
            {
                "table": table,
                "heads": [(group, [c.group for c in table.columns].count(group)) for group in _groups(table)],
                "figures": figures(table, f"{table.title.split()[0].lower()}"),
            }
            for table in tables
        ],
        results=results,
        scored=scored,
        versions={words: count for words, count in versions.items() if words},
        warnings=warnings,
        sources=sources(tables),
        legend=f"{LEGEND} {MISSING}",
    )
