"""The package is built as docs/architecture.md says: imports run one way, and files and functions stay short.

Only the source is read. The last tests here plant mistakes in small packages, to see that the rules find them.
"""

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"

# A module imports from its own folder and from those before it.
ORDER = [
    *("errors", "files", "backbones", "distributed", "data", "frozen_stream", "methods", "recipe", "runtime", "runs"),
    *("training", "planning", "report", "inference", "experiments", "cli"),
]
TOP = ["__init__", "__main__", "train"]  # what is started or imported from outside: above everything
STRANGERS = [{"backbones", "distributed"}]  # neither imports the other
IMPORTED_IN = {  # the only folders that import a library
    "accelerate": {"distributed", "training", "frozen_stream", "planning", "experiments"},
    "deepspeed": {"distributed", "training"},
    "timm": {"backbones", "data", "methods", "training"},
}
CREATES_MODELS = "backbones"  # the only folder that calls what timm makes models with
CREATORS = ("timm.create_model", "timm.models")
FOR_EVERYBODY = {"dist_vpt.__version__"}


def load_structure() -> ModuleType:
    """tools/structure.py, which is no package."""
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


structure = load_structure()


def folder_of(name: str) -> str:
    """The top-level folder or module that a dotted name of the package is in."""
    folder = [*name.split("."), "__init__"][1]
    return folder if folder in ORDER + TOP else "__init__"


def rank(folder: str) -> int:
    """How high a folder stands."""
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


def imports(root: Path) -> Iterator[tuple[str, str, str]]:
    """Everything that is imported: the folder that imports it, its full name, and the place."""
    for module, path in structure.find_modules(root).items():
        for name, line in structure.imported_names(module, path):
            yield folder_of(module), name, f"{path.relative_to(root)}:{line}: {name}"


def folders_without_a_place(root: Path) -> list[str]:
    known = {"dist_vpt", *(f"dist_vpt.{name}" for name in ORDER + TOP)}
    return sorted({".".join(module.split(".")[:2]) for module in structure.find_modules(root)} - known)


def imports_from_above(root: Path) -> list[str]:
    inside = [
        found for found in imports(root) if found[1].split(".")[0] == "dist_vpt" and found[1] not in FOR_EVERYBODY
    ]
    return [place for folder, name, place in inside if rank(folder_of(name)) > rank(folder)]


def imports_between_strangers(root: Path) -> list[str]:
    inside = [found for found in imports(root) if found[1].split(".")[0] == "dist_vpt"]
    return [place for folder, name, place in inside if {folder, folder_of(name)} in STRANGERS]


def misplaced_libraries(root: Path) -> list[str]:
    libraries = [(folder, name.split(".")[0], place) for folder, name, place in imports(root)]
    return [place for folder, name, place in libraries if folder not in IMPORTED_IN.get(name, {folder})]


def models_created_elsewhere(root: Path) -> list[str]:
    found = []
    for module, path in structure.find_modules(root).items():
        if folder_of(module) == CREATES_MODELS:
            continue
        tree = structure.parse(path)
        names = dict(local_names(tree))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            first, *rest = ast.unparse(call.func).split(".")
            called = ".".join([names.get(first, first), *rest])
            if any(called == creator or called.startswith(f"{creator}.") for creator in CREATORS):
                found.append(f"{path.relative_to(root)}:{call.lineno}: {called}")
    return found


def local_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The names that imports bind in a file, with what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def circles(root: Path) -> list[list[str]]:
    return structure.import_circles(structure.import_graph(structure.find_modules(root)))


def long_files(root: Path) -> list[tuple[str, int]]:
    return structure.long_files(structure.find_modules(root))


def long_functions(root: Path) -> list[tuple[str, int]]:
    return structure.long_functions(structure.find_modules(root))


def modules_named_utils(root: Path) -> list[str]:
    return [module for module in structure.find_modules(root) if "utils" in module.split(".")]


def order_of(page: str) -> list[str]:
    """The folders in the first line of a page that lists them: `errors` -> `files` -> ..."""
    lines = (line.replace("`", "").strip() for line in page.splitlines() if "`" in line)
    line = next((line for line in lines if line.startswith("errors ->")), None)
    assert line is not None, "no line lists the folders in order, as in `errors` -> `files`"
    return line.split(" -> ")


RULES: list[Callable[[Path], list]] = [
    folders_without_a_place,
    imports_from_above,
    imports_between_strangers,
    misplaced_libraries,
    models_created_elsewhere,
    circles,
    long_files,
    long_functions,
    modules_named_utils,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule: Callable[[Path], list]) -> None:
    assert structure.find_modules(ROOT)
    assert rule(ROOT) == []


@pytest.mark.skipif(not PAGE.exists(), reason="docs/architecture.md is not there")
def test_the_page_lists_the_folders_in_the_same_order() -> None:
    assert order_of(PAGE.read_text(encoding="utf-8")) == ORDER


def test_a_page_without_the_list_is_noticed() -> None:
    assert order_of("# A\n\nerrors come first\n\n`errors` -> `files`\n`errors` -> `cli`\n") == ["errors", "files"]
    assert order_of("`errors -> files -> cli`") == ["errors", "files", "cli"]
    with pytest.raises(AssertionError, match="no line lists the folders"):
        order_of("# Architecture\n\nThe `errors` come first -> then the files.\n")


MISTAKES = [
    (folders_without_a_place, "agreement.py", ""),
    (folders_without_a_place, "engine/loop.py", ""),
    (imports_from_above, "methods/vqt.py", "from dist_vpt.training.engine import fit"),
    (imports_from_above, "methods/vqt.py", "def build():\n    import dist_vpt.cli.main"),
    (imports_from_above, "methods/vqt.py", "if TYPE_CHECKING:\n    from dist_vpt import recipe"),
    (imports_from_above, "methods/vqt.py", "from ..recipe.schema import Recipe"),
    (imports_from_above, "cli/train.py", "from dist_vpt.train import main"),
    (imports_from_above, "report/tables.py", "from dist_vpt import load"),
    (imports_from_above, "report/tables.py", "module = importlib.import_module('dist_vpt.cli')"),
    (imports_between_strangers, "backbones/build.py", "from dist_vpt.distributed import collectives"),
    (imports_between_strangers, "distributed/watchdog.py", "import dist_vpt.backbones"),
    (misplaced_libraries, "methods/vqt.py", "from accelerate.utils import send_to_device"),
    (misplaced_libraries, "planning/planner.py", "def plan():\n    import deepspeed.utils as tools"),
    (misplaced_libraries, "runs/folder.py", "from timm.data import constants"),
    (models_created_elsewhere, "methods/side.py", "import timm\nnet = timm.create_model('resnet18')"),
    (models_created_elsewhere, "methods/side.py", "from timm import create_model as make\nnet = make('resnet18')"),
    (models_created_elsewhere, "methods/side.py", "from timm.models.vision_transformer import Block as B\nb = B(8)"),
    (models_created_elsewhere, "methods/side.py", "import timm.models.eva\nnet = timm.models.eva.Eva()"),
    (long_files, "runs/folder.py", "x = 1\n" * 401),
    (long_functions, "runs/folder.py", "class A:\n    @staticmethod\n    def f():\n" + "        x = 1\n" * 60),
    (modules_named_utils, "data/utils.py", ""),
    (modules_named_utils, "data/utils/images.py", ""),
]


def plant(root: Path, file: str, text: str) -> None:
    path = root / "dist_vpt" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("rule", "file", "text"), MISTAKES)
def test_a_mistake_is_found(rule: Callable[[Path], list], file: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path, file, text)
    assert len(rule(tmp_path)) == 1


def test_a_circle_is_found_though_its_imports_are_lazy_or_of_types(tmp_path: Path) -> None:
    plant(tmp_path, "runs/a.py", "from dist_vpt.runs import b")
    plant(tmp_path, "runs/b.py", "def f():\n    from dist_vpt.runs.c import g")
    plant(tmp_path, "runs/c.py", "if TYPE_CHECKING:\n    from .a import h")
    plant(tmp_path, "runs/d.py", "from dist_vpt.runs import a")
    assert circles(tmp_path) == [["dist_vpt.runs.a", "dist_vpt.runs.b", "dist_vpt.runs.c"]]


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    plant(tmp_path, "__init__.py", "__version__ = '1'\nfrom dist_vpt.inference.load import load")
    plant(tmp_path, "train.py", "from dist_vpt.cli.train import main")
    plant(tmp_path, "cli/__init__.py", "def main():\n    from dist_vpt import errors, __version__\n")
    plant(tmp_path, "training/engine.py", "import accelerate, deepspeed\nfrom dist_vpt.methods.vqt import VQT")
    plant(tmp_path, "methods/vqt.py", "from .base import Method\nfrom timm.layers import Mlp\nmlp = Mlp(8)")
    plant(tmp_path, "backbones/build.py", "import timm\nmodel = timm.create_model('vit')\n" + "x = 1\n" * 398)
    plant(tmp_path, "runs/folder.py", "@cache\ndef f():\n" + "    x = 1\n" * 59)
    assert [found for rule in RULES for found in rule(tmp_path)] == []
