"""Write the reference pages of the docs from the code that they describe.

    python tools/make_reference.py           # writes docs/reference/*.md
    python tools/make_reference.py --check   # writes nothing; exit code 1 if a page is out of date

recipe.md comes from the pydantic schema, cli.md from argparse and backbones.md from the table of published weights.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

# The only three things that this script takes from the package.
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.cli.main import build_parser
from dist_vpt.recipe.schema import Recipe

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by tools/make_reference.py; do not edit. -->\n"
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "`null`"}
HUGE = 2**31  # a limit from here on only says that the number fits into 64 bits


def pages() -> dict[str, str]:
    """The pages by file name."""
    written = {"recipe.md": recipe_page(), "cli.md": cli_page(), "backbones.md": backbones_page()}
    return {name: f"{NOTE}\n{text.rstrip()}\n" for name, text in written.items()}


def recipe_page() -> str:
    """A table for each section of the recipe, and for each method."""
    schema = Recipe.model_json_schema()
    parts = [
        "# Recipe keys",
        "Every key of a recipe, with what it may be and its default. In a file a section is a mapping "
        "(`optim: {lr: 0.5}`); on the command line a key is written with a dot (`optim.lr=0.5`). "
        "`dist-vpt recipe show RECIPE` prints the values of a recipe, and `dist-vpt recipe schema` the JSON Schema for "
        "editors. How recipes are merged: [Recipes](../recipes.md).",
        *_section_tables(schema, schema["properties"], ""),
    ]
    return "\n\n".join(parts)


def _section_tables(schema: dict[str, Any], properties: dict[str, Any], prefix: str) -> Iterator[str]:
    """A table of the plain keys, then the sections below them."""
    sections = {name: found for name, value in properties.items() if (found := _models(schema, value))}
    if plain := {name: value for name, value in properties.items() if name not in sections}:
        yield _table(
            ("key", "value", "default", "what it does"),
            [
                (f"`{prefix}{name}`", _type(value), _default(value), _prose(value.get("description", "")))
                for name, value in plain.items()
            ],
        )
    for name, models in sections.items():
        path = f"{prefix}{name}"
        yield f"{'##' if not prefix else '###'} {path}"
        if description := properties[name].get("description"):
            yield f"{_sentence(description)}"
        if len(models) == 1:
            yield from _section_tables(schema, models[0]["properties"], f"{path}.")
            continue
        for model in models:
            tag = model["properties"]["name"]
            keys = {key: value for key, value in model["properties"].items() if key != "name"}
            yield f"### {path}.name = {tag['const']}"
            yield _sentence(model.get("description", tag["description"]))
            yield from _section_tables(schema, keys, f"{path}.") if keys else ["It has no settings."]


def _models(schema: dict[str, Any], value: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections that a key holds; several where the key ``name`` chooses among them."""
    options = [value, *value.get("oneOf", []), *value.get("anyOf", [])]
    return [schema["$defs"][option["$ref"].split("/")[-1]] for option in options if "$ref" in option]


def _type(value: dict[str, Any]) -> str:
    """What a value may be, in words."""
    kind = value.get("type")
    if "anyOf" in value:
        text = " or ".join(_type(option) for option in value["anyOf"])
    elif "enum" in value:
        text = _choices(value["enum"])
    elif kind == "array" and "prefixItems" in value:
        text = f"list of {len(value['prefixItems'])} values: {_type(value['prefixItems'][0])}"
    elif "$ref" in value:
        text = "mapping"
    elif kind == "array":
        text = f"list of {_type(value['items'])}"
    elif kind == "object":
        names = value.get("propertyNames", {}).get("enum")
        text = f"mapping of {_choices(names)}" if names else "mapping"
    else:
        limits = [f"{sign} {value[key]:g}" for key, sign in LIMITS.items() if key in value and value[key] < HUGE]
        text = " ".join([TYPES[str(kind)], *([f"({' and '.join(limits)})"] if limits else [])]).replace("<", "&lt;")
    return text


def _choices(values: Sequence[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _default(value: dict[str, Any]) -> str:
    if "default" not in value:
        return "none"
    default = value["default"]
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def cli_page() -> str:
    """A section for each sub-command."""
    parts = [
        "# Command line",
        "`dist-vpt COMMAND --help` shows the same. `--debug`, which every command has, adds the traceback to an error. "
        "Exit codes are explained in [Resuming and faults](../resuming.md#exit-codes).",
        *_commands(build_parser(), ""),
    ]
    return "\n\n".join(parts)


def _commands(parser: argparse.ArgumentParser, summary: str) -> Iterator[str]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    shown = [action for action in parser._actions if action not in nested and action.dest not in ("help", "debug")]
    runs = parser.get_default("call") is not None  # or it only groups other commands
    if runs:
        yield f"## {parser.prog}"
        yield _sentence(summary)
        words = [parser.prog, *(_usage(action) for action in shown)]
        yield f"```text\n{' '.join(words)}\n```"
        rows = [(f"`{_flags(action)}`", _prose(_help(action))) for action in shown]
        if rows:
            yield _table(("argument", "what it does"), rows)
    for action in nested:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, command in action.choices.items():
            yield from _commands(command, helps.get(name, ""))


def _value(action: argparse.Action) -> str:
    """What an argument takes, as its help shows it."""
    if isinstance(action.metavar, str):
        return action.metavar
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _flags(action: argparse.Action) -> str:
    if not action.option_strings:
        return _value(action)
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {_value(action)}{_more(action)}"


def _more(action: argparse.Action) -> str:
    return " ..." if action.nargs in ("+", "*") else ""


def _usage(action: argparse.Action) -> str:
    if action.option_strings:
        name = (
            " | ".join(action.option_strings) if action.nargs == 0 else f"{action.option_strings[0]} {_value(action)}"
        )
        return name if action.required else f"[{name}]"
    value = _value(action)
    return {"+": f"{value} [{value} ...]", "*": f"[{value} ...]", None: value}.get(action.nargs, value)  # type: ignore[call-overload]


def _help(action: argparse.Action) -> str:
    text = action.help or ""
    if action.default in (None, argparse.SUPPRESS, [], False, True) or "default" in text or text.endswith(")"):
        return text
    return f"{text} (default: {action.default})".strip()


def backbones_page() -> str:
    """A table for each project whose weights have short names."""
    parts = [
        "# Backbones with short names",
        f"{len(ZOO)} sets of published weights. Use one with `backbone.name=NAME backbone.weights=FILE`, where the "
        "file is the project's own; if the hub has a copy, `backbone.weights=pretrained` (the default) fetches it. "
        "`dist-vpt backbones` prints the same table. How weights are loaded and checked: [Backbones](../backbones.md).",
    ]
    rows = sorted(ZOO.items(), key=lambda item: [*dict.fromkeys(map(_project, ZOO.values()))].index(_project(item[1])))
    for (source, license, layout), group in groupby(rows, key=lambda item: _project(item[1])):
        members = list(group)
        parts.append(f"## {source.removeprefix('github.com/')}")
        parts.append(f"[{source}](https://{source}), license {license}, file layout `{layout}`.")
        for note, same in groupby(members, key=lambda item: _preprocessing(item[1])):
            parts.append(note)
            parts.append(
                _table(
                    ("name", "timm model", "pixels", "pooling", "on the hub", "trained on"),
                    [
                        (
                            f"`{name}`",
                            f"`{row.architecture}`",
                            str(row.size),
                            row.pool,
                            f"`.{row.tag}`" if row.tag else "no",
                            row.trained,
                        )
                        for name, row in same
                    ],
                )
            )
    return "\n\n".join(parts)


def _project(row: Any) -> tuple[str, str, str]:
    return *row.project, row.layout


def _preprocessing(row: Any) -> str:
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in row.channels[1:])
    return f"Preprocessing: mean {mean}; std {std}; {row.interpolation} resizing."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *([text.replace("|", "\\|") for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _prose(text: str) -> str:
    """Text of the code as Markdown: what looks like a tag or a link stays text."""
    return " ".join(text.split()).replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*").replace("%%", "%")


def _sentence(text: str) -> str:
    text = _prose(text).rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or check them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/reference from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    old = []
    for name, text in pages().items():
        path = FOLDER / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        old.append(path)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path)
    if check and old:
        names = ", ".join(str(path.relative_to(FOLDER.parents[1])) for path in old)
        print(f"{names}: out of date; run python tools/make_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
