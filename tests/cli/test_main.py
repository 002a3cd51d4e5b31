"""The command line: its arguments, its exit codes, what it prints, and what it does not import."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dist_vpt import __version__
from dist_vpt.cli.main import build_parser, main, run_with_exit_code
from dist_vpt.errors import Interrupted, RunFailed, UserError
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import json_schema

# Every sub-command with its arguments. A change here is a change of what users type.
COMMANDS = {
    "dist-vpt": {"--help", "--version"},
    "dist-vpt train": {"--help", "--debug", "RECIPE|a.b=c +"},
    "dist-vpt sweep": {"--help", "--debug", "RECIPE|a.b=c +", "--sampler"},
    "dist-vpt rank-backbones": {"--help", "--debug", "RECIPE|a.b=c +", "--best"},
    "dist-vpt probe": {"--help", "--debug", "RECIPE|a.b=c *", "--backbones", "--out"},
    "dist-vpt features": {"--help", "--debug", "RECIPE|a.b=c +", "--out", "--split", "--what", "--format"},
    "dist-vpt plan": {"--help", "--debug", "RECIPE|a.b=c +", "--gpus", "--nodes", "--gpu-memory", "--measure"},
    "dist-vpt eval": {"--help", "--debug", "RUN", "--split", "--adapters", "--out", "--weights", "a.b=c *"},
    "dist-vpt predict": {
        *("--help", "--debug", "RUN", "IMAGE +", "--adapters", "--calibrated", "--top", "--out", "--weights"),
    },
    "dist-vpt attention": {
        *("--help", "--debug", "RUN", "IMAGE +", "--adapters", "--block", "--head", "--out", "--weights"),
    },
    "dist-vpt merge": {"--help", "--debug", "RUN", "--out", "--adapters", "--weights"},
    "dist-vpt push": {
        *("--help", "--debug", "RUN", "hub:USER/NAME", "--adapters", "--private", "--revision", "--message"),
        *("--license", "--dry-run", "--out"),
    },
    "dist-vpt import-peft": {"--help", "--debug", "DIR", "RECIPE|a.b=c *", "--out", "--classes"},
    "dist-vpt export": {
        *("--help", "--debug", "RUN", "--out", "--format", "--merge", "--dynamic-batch", "--preprocessing"),
        *("--quantize", "--adapters", "--weights"),
    },
    "dist-vpt compress": {
        *("--help", "--debug", "RUN", "--keep", "--mode", "--adapters", "--lasso", "--out", "a.b=c *"),
        "--weights",
    },
    "dist-vpt suite": {
        *(
            "--help",
            "--debug",
            "RECIPE|a.b=c *",
            "--tasks",
            "--method",
            "--shots",
            "--root",
            "--out",
            "--workers",
            "--index",
        ),
        *("--slurm", "--dry-run"),
    },
    "dist-vpt status": {"--help", "--debug", "DIR *", "--json", "--watch"},
    "dist-vpt data": {"--help"},
    "dist-vpt data prepare": {"--help", "--debug", "TASK +", "--root", "--format"},
    "dist-vpt data check": {"--help", "--debug", "TASK|a.b=c *", "--root", "--storage"},
    "dist-vpt backbones": {"--help", "--debug"},
    "dist-vpt backbones check": {"--help", "--debug", "FILE", "--entry"},
    "dist-vpt launch": {"--help"},
    "dist-vpt launch slurm": {
        *(
            "--help",
            "--debug",
            "RECIPE|a.b=c +",
            "--nodes",
            "--gpus-per-node",
            "--time",
            "--strategy",
            "--max-restarts",
        ),
        "--dry-run",
    },
    "dist-vpt doctor": {"--help", "--debug", "--run-dir", "--json"},
    "dist-vpt compare": {"--help", "--debug", "RUN +", "--split", "--adapters", "--json"},
    "dist-vpt report": {"--help", "--debug", "DIR +", "--out", "--no-published"},
    "dist-vpt recipe": {"--help"},
    "dist-vpt recipe list": {"--help", "--debug"},
    "dist-vpt recipe copy": {"--help", "--debug", "NAME", "FILE ?"},
    "dist-vpt recipe show": {"--help", "--debug", "RECIPE|a.b=c *"},
    "dist-vpt recipe schema": {"--help", "--debug"},
}
CHOICES = {
    "--storage": ("image_folder", "vtab_folder", "fgvc_json", "hf", "table", "webdataset"),
    "--split": ("train", "val", "trainval", "test"),
    "--adapters": ("last", "best"),
    "--format": ("array_record", "tfrecord"),
    "dist-vpt features --format": ("safetensors", "parquet"),
    "--sampler": ("grid", "halving", "optuna"),
    "dist-vpt export --format": ("torch", "onnx", "safetensors", "peft"),
    "--preprocessing": ("none", "normalize", "resize"),
    "--quantize": ("none", "int8"),
    "--what": ("pooled", "blocks", "tokens"),
    "--mode": ("compress", "featselect", "finetune"),
}


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False, timeout=120)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _parsers(inner)


def test_sub_commands_and_options() -> None:
    found: dict[str, set[str]] = {}
    for parser in _parsers(build_parser()):
        listed = set()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            if action.option_strings:
                listed.add(max(action.option_strings, key=len))
                option = action.option_strings[0]
                expected = CHOICES.get(f"{parser.prog} {option}", CHOICES.get(option))
                assert action.choices is None or tuple(action.choices) == expected
            else:
                listed.add(f"{action.metavar} {action.nargs}" if action.nargs else str(action.metavar))
            assert action.help
        found[parser.prog] = listed
    assert found == COMMANDS


def test_importing_the_package_and_asking_for_help_imports_no_torch() -> None:
    code = """
import contextlib, sys
import dist_vpt.cli.main
commands = (
    *("train", "plan", "suite", "status", "data check", "backbones check", "report", "recipe show", "doctor"),
    *("recipe list", "launch slurm", "eval", "compress", "probe", "features", "rank-backbones", "push", "export"),
)
for argv in (["--help"], *([*command.split(), "--help"] for command in commands), ["--version"], ["nonsense"]):
    with contextlib.suppress(SystemExit):
        dist_vpt.cli.main.main(argv)
heavy = {"torch", "timm", "numpy", "accelerate", "pydantic", "torchmetrics", "matplotlib", "jinja2", "rich"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "usage: dist-vpt" in done.stdout


def test_python_m_is_the_command() -> None:
    done = python("-m", "dist_vpt", "--version")
    assert (done.returncode, done.stdout) == (0, f"dist-vpt {__version__}\n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["train"],
        ["train", "--nonsense"],
        ["train", "a.yaml", "--nonsense", "x=1"],
        ["eval"],
        ["eval", "run", "--split", "nonsense"],
        ["eval", "run", "--adapters", "worst"],
        ["predict", "run"],
        ["predict", "run", "image", "--top", "many"],
        ["merge", "run"],
        ["push", "run"],
        ["export", "run"],
        ["export", "run", "--out", "run.onnx", "--quantize", "int4"],
        ["rank-backbones"],
        ["rank-backbones", "combo", "--best", "many"],
        ["compress", "run"],
        ["compress", "run", "--keep", "0.5", "--mode", "nonsense"],
        ["compress", "run", "--keep", "0.5", "--lasso", "much"],
        ["backbones", "nonsense"],
        ["backbones", "check"],
        ["report"],
        ["report", "runs", "--out"],
        ["recipe"],
        ["recipe", "schema", "more"],
        ["recipe", "list", "more"],
        ["recipe", "copy"],
        ["recipe", "copy", "vqt", "mine.yaml", "more"],
    ],
    ids=" ".join,
)
def test_arguments_that_make_no_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: dist-vpt" in capsys.readouterr().err


@pytest.mark.parametrize("call", ["train", "sweep", "plan"])
def test_keys_given_as_on_other_command_lines(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([call, "seed=1", "--epochs", "3"])
    assert "unrecognized arguments: --epochs 3 (keys of the recipe are given as train.epochs=3)" in (
        capsys.readouterr().err
    )
    assert main([call, "optim.lr", "=", "4"]) == 2
    message = "error: command line: optim.lr = 4: an override has no spaces around =; write optim.lr=4\n"
    assert capsys.readouterr().err == message


def test_local_sh_rejects_unknown_names() -> None:
    script = Path(__file__).parents[2] / "launch" / "local.sh"
    for argv in (["zero9", "seed=1"], ["ddp", "2", "nix.yaml"], ["ddp", "2", "vpt_dep"]):
        done = subprocess.run([script, *argv], capture_output=True, text=True, check=False)
        nothing = next(name for name in argv if name in {"zero9", "nix.yaml", "vpt_dep"})
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"local.sh: {nothing}: neither a strategy of launch/accelerate nor a recipe\n"


@pytest.mark.parametrize(
    ("argv", "files_and_overrides"),
    [
        (["train", "a.yaml", "x=1"], ["a.yaml", "x=1"]),
        (["train", "--debug", "a.yaml", "x=1"], ["a.yaml", "x=1"]),
        (["train", "a.yaml", "--debug", "x=1", "y=2"], ["a.yaml", "x=1", "y=2"]),
        (["train", "a.yaml", "x=1", "--debug"], ["a.yaml", "x=1"]),
    ],
)
def test_train_passes_recipe_arguments_on(
    argv: list[str], files_and_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("dist_vpt.cli.train.train", lambda arguments: seen.append(arguments.recipe))
    assert main(argv) == 0
    assert seen == [files_and_overrides]


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "run", "x=1", "y=2", "--split", "val"],
        ["eval", "run", "--split", "val", "x=1", "y=2"],
        ["eval", "--split", "val", "run", "x=1", "y=2"],
        ["eval", "run", "x=1", "--split", "val", "y=2"],
    ],
    ids=" ".join,
)
def test_overrides_of_eval_may_stand_anywhere(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr("dist_vpt.inference.evaluate.evaluate_run", lambda *arguments: seen.append(arguments))
    assert main(argv) == 0
    assert seen == [("run", "val", "last", ["x=1", "y=2"], None, None)]


@pytest.mark.parametrize(
    "argv",
    [
        ["predict", "run", "a.png", "b.png", "--top", "3"],
        ["predict", "run", "a.png", "--top", "3", "b.png"],
        ["predict", "--top", "3", "run", "a.png", "b.png"],
    ],
    ids=" ".join,
)
def test_images_of_predict_may_stand_anywhere(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        "dist_vpt.inference.predict.predict", lambda *arguments, **named: seen.append((*arguments, named))
    )
    assert main(argv) == 0
    assert main([*argv, "--calibrated"]) == 0
    named = [{"calibrated": used, "weights": None} for used in (False, True)]
    assert seen == [("run", ["a.png", "b.png"], "last", 3, None, each) for each in named]


@pytest.mark.parametrize(
    "argv",
    [
        ["compress", "run", "--keep", "0.7", "0.5", "x=1", "y=2"],
        ["compress", "run", "x=1", "--keep", "0.7", "0.5", "--mode", "featselect", "y=2"],
        ["compress", "run", "x=1", "y=2", "--keep", "0.7", "0.5"],
    ],
    ids=" ".join,
)
def test_overrides_of_compress_may_stand_anywhere(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr("dist_vpt.experiments.compress.compress", lambda *arguments: seen.append(arguments))
    assert main(argv) == 0
    assert seen == [("run", ["0.7", "0.5"], "featselect", "last", 1e-4, None, ["x=1", "y=2"], None)]


@pytest.mark.parametrize("argv", [["report", "a", "b", "--out", "c"], ["report", "a", "--out", "c", "b"]], ids=" ".join)
def test_folders_of_report_may_stand_anywhere(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr("dist_vpt.report.tables.report", lambda *arguments, **named: seen.append((*arguments, named)))
    assert main(argv) == 0
    assert main([*argv, "--no-published"]) == 0
    assert seen == [(["a", "b"], "c", {"with_published": shown}) for shown in (True, False)]


def test_recipe_show_prints_the_resolved_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3")
    assert main(["recipe", "show", str(file), "optim.lr=1e-3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seed"], printed["optim"]["lr"], printed["run"]["dir"]) == (3, 0.001, "runs/a")
    assert main(["recipe", "show"]) == 0
    assert capsys.readouterr().out == load_recipe([]).to_yaml()


def test_recipe_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(json_schema()))


# Exit codes and tracebacks


def _raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("fix it"), 2), (RunFailed("fix it"), 3), (Interrupted("fix it"), 75)]
)
def test_a_users_mistake_is_one_message(
    error: UserError, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert run_with_exit_code(lambda: _raising(error), debug=False) == code
    assert capsys.readouterr().err == "error: fix it\n"
    with pytest.raises(type(error)):
        run_with_exit_code(lambda: _raising(error), debug=True)
    monkeypatch.setenv("RANK", "3")
    run_with_exit_code(lambda: _raising(error), debug=False)
    assert capsys.readouterr().err == "[process 3] error: fix it\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_with_exit_code(lambda: 1 / 0, debug=False)


def test_control_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_exit_code(lambda: _raising(KeyboardInterrupt()), debug=False) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        run_with_exit_code(lambda: _raising(KeyboardInterrupt()), debug=True)


@pytest.mark.slow
def test_tracebacks_are_for_debug() -> None:
    quiet = python("-m", "dist_vpt", "recipe", "show", "nix.yaml")
    assert quiet.returncode == 2
    assert quiet.stdout == ""
    assert "command line: nix.yaml: no such recipe file" in quiet.stderr
    assert "Traceback" not in quiet.stderr
    loud = python("-m", "dist_vpt", "recipe", "show", "nix.yaml", "--debug")
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr
    assert "command line: nix.yaml: no such recipe file" in loud.stderr


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_closed_stream_is_no_mistake(closed: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m dist_vpt recipe schema {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_figures_need_no_backend_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert main(["recipe", "schema"]) == 0
    assert os.environ["MPLBACKEND"] == "agg"


def test_a_reader_that_has_gone_is_no_mistake() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "dist_vpt", "recipe", "schema"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
