"""Measure the structure of the package: long files, long functions, import circles and lines in all.

    python tools/structure.py                    # the counts
    python tools/structure.py --list             # and what is behind them
    python tools/structure.py --root ../before   # of another checkout
    python tools/structure.py --check            # exit code 1 unless all counts but the lines are zero

Everything is read from the source; nothing of the package is imported.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PACKAGE = "dist_vpt"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def find_modules(root: Path) -> dict[str, Path]:
    """All modules of the package below ``root``, by dotted name; a folder's ``__init__.py`` has the folder's name."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_names(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Everything that a module imports, as full dotted names with their lines.

    ``from a.b import c`` gives ``a.b.c``, whether c is a submodule or not. Imports at the top, in functions and under
    TYPE_CHECKING count alike, and so does ``import_module("a.b")``.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = [*above, *(node.module.split(".") if node.module else [])]
            yield from ((".".join([*origin, alias.name]), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, node.lineno


def import_graph(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports; the package's version is for everybody."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for name, _ in imported_names(module, path):
            parts = name.split(".")
            if parts[1:] == ["__version__"]:
                continue
            prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            graph[module].update([prefix for prefix in prefixes if prefix in modules][:1])
    return graph


def import_circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules in which each imports, directly or not, every other one."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reached = {module: reachable(module) for module in graph}
    groups = {tuple(sorted({a, *(b for b in reached[a] if a in reached[b])})) for a in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def count_lines(path: Path) -> int:
    """The number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def long_files(modules: Mapping[str, Path]) -> list[tuple[str, int]]:
    """Modules of more than MAX_FILE_LINES lines, with their lines, the longest first."""
    lengths = ((module, count_lines(path)) for module, path in modules.items())
    return sorted((found for found in lengths if found[1] > MAX_FILE_LINES), key=lambda found: -found[1])


def long_functions(modules: Mapping[str, Path]) -> list[tuple[str, int]]:
    """Functions and methods of more than MAX_FUNCTION_LINES lines without decorators, with their lines."""

    def below(node: ast.AST, name: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield inner, (child.end_lineno or child.lineno) - child.lineno + 1
            yield from below(child, inner)

    lengths = (found for module, path in modules.items() for found in below(parse(path), module))
    return sorted((found for found in lengths if found[1] > MAX_FUNCTION_LINES), key=lambda found: -found[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts; returns the exit code."""
    parser = argparse.ArgumentParser(description=f"Measure the structure of {PACKAGE}.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="a checkout; default: this one")
    parser.add_argument("--list", action="store_true", help="name every file, function and circle")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a count is not zero")
    options = parser.parse_args(arguments)
    modules = find_modules(options.root)
    if not modules:
        parser.error(f"--root {options.root}: no package {PACKAGE} is there")
    circles = import_circles(import_graph(modules))
    findings = {
        f"files over {MAX_FILE_LINES} lines": [f"{lines:5,} {name}" for name, lines in long_files(modules)],
        f"functions over {MAX_FUNCTION_LINES} lines": [f"{lines:5,} {name}" for name, lines in long_functions(modules)],
        "import circles": [f"{len(circle)} modules: {', '.join(circle)}" for circle in circles],
    }
    for title, found in findings.items():
        print(f"{title}: {len(found)}")
        for line in found if options.list else ():
            print(f"  {line}")
    print(f"lines: {sum(map(count_lines, modules.values())):,} in {len(modules)} files")
    return int(options.check and any(findings.values()))


if __name__ == "__main__":
    sys.exit(main())
