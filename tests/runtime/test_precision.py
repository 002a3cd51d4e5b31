"""runtime.precision=auto: what it comes to on a machine, that it stays so for a run, and that the log says it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_vpt.cli.main import main
from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.experiments.sweep import sweep
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runtime import cpu_speed
from dist_vpt.runtime.cpu_speed import CPUSpeed
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training import accelerator as accelerator_module
from tests.running import TINY, train

AUTO = load_recipe([], ["runtime.precision=auto", "runtime.device=cpu"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def machine(monkeypatch: pytest.MonkeyPatch, times: float, onednn: float = 1.0) -> None:
    """A CPU that multiplies so many times as fast in bf16, and in float32 by oneDNN, as torch does in float32."""
    monkeypatch.setattr(cpu_speed, "_measure", lambda: CPUSpeed(times, onednn))


@pytest.mark.parametrize(
    ("times", "chosen"), [(0.3, "fp32"), (1.0, "fp32"), (1.19, "fp32"), (1.2, "bf16"), (6, "bf16")]
)
def test_a_cpu_s_precision_is_the_one_it_multiplies_faster_in(
    times: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, times)
    recipe, why = resolve_precision(AUTO)
    assert recipe == AUTO.changed("runtime", precision=chosen)
    assert why == f"{chosen}, since this CPU multiplies {times:.1f} times as fast in bf16 as in fp32"


def test_bf16_is_compared_with_the_faster_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2.3, onednn=2.0)
    assert resolve_precision(AUTO)[1] == "fp32, since this CPU multiplies 1.1 times as fast in bf16 as in fp32"


def test_a_precision_that_was_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 6)
    for given in ("fp32", "bf16", "fp16"):
        recipe = load_recipe([], [f"runtime.precision={given}"])
        assert resolve_precision(recipe) == (recipe, "")


@pytest.mark.parametrize(
    ("supported", "why"),
    [(True, "bf16, in which a card computes"), (False, "fp32, since a card has no units for bf16")],
)
def test_a_gpu_s_precision_is_that_of_the_process_s_own_device(
    supported: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        set_device=asked.append,
        get_device_name=lambda: "a card",
        is_bf16_supported=lambda including_emulation: asked.append(including_emulation) or supported,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    recipe, line = resolve_precision(AUTO.changed("runtime", device="auto"))
    assert (recipe.runtime.precision, line) == (why[:4], why)
    assert asked == [1, False]  # its device before anything asks CUDA; and no emulation
    assert resolve_precision(AUTO)[1].endswith("as in fp32")  # runtime.device=cpu asks no GPU
    assert asked == [1, False]


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 6)
    result = train(tmp_path / "r", "runtime.precision=auto")
    assert result["precision"] == "bf16"
    assert result["runtime"]["precision"] == "bf16, since this CPU multiplies 6.0 times as fast in bf16 as in fp32"
    assert "precision bf16, since this CPU multiplies" in (tmp_path / "r/train.log").read_text()
    assert RunFolder(tmp_path / "r").load().runtime.precision == "bf16"
    machine(monkeypatch, 0.3)
    monkeypatch.setattr(cpu_speed, "_machine", lambda: "another")
    recipe, why = resolve_precision(AUTO, RunFolder(tmp_path / "r").precision)
    assert (recipe.runtime.precision, why) == ("bf16", "bf16, as the run began")
    assert train(tmp_path / "r", "runtime.precision=auto", "run.resume=auto") == result
    assert (
        main(["train", *TINY, "method.prompts=2", "runtime.precision=auto", f"run.dir={tmp_path}/r", "run.resume=auto"])
        == 0
    )
    with pytest.raises(RunFolderError, match=r"runtime\.precision"):
        train(tmp_path / "r", "runtime.precision=fp32", "run.resume=auto")


def test_a_start_that_failed_with_nothing_saved_binds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise UserError("no")

    with monkeypatch.context() as patched:
        patched.setattr("dist_vpt.experiments.run.fit", broken)
        with pytest.raises(UserError, match="no"):
            train(tmp_path / "r", "runtime.precision=fp32")
    machine(monkeypatch, 6)
    assert train(tmp_path / "r", "runtime.precision=auto")["precision"] == "bf16"


@pytest.mark.slow
def test_a_suite_ends_with_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 6)
    (tmp_path / "dig.yaml").write_text("data: {task: digits, workers: 0, image_size: 8}\n")
    (tmp_path / "lin.yaml").write_text(
        "method: {name: linear}\nsweep: {grid: {optim: {lr: [0.01, 0.02]}}, seeds: [0]}\n"
    )
    suite = ["suite", "train.epochs=1", "optim.warmup_epochs=0", "train.batch_size=200", "runtime.precision=auto"]
    suite += ["--tasks", f"{tmp_path}/dig.yaml", "--method", f"{tmp_path}/lin.yaml", "--workers", "1"]
    assert main([*suite, "--out", f"{tmp_path}/out"]) == 0
    (line,) = (tmp_path / "out/results.jsonl").read_text().splitlines()
    assert json.loads(line)["precision"] == "bf16"
    machine(monkeypatch, 0.3)
    assert main([*suite, "--out", f"{tmp_path}/out"]) == 0
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_sweep_and_its_runs_have_one_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 6)
    grid = ["sweep.grid={optim: {lr: [0.1, 0.2]}}", "sweep.seeds=[0]", "method.name=linear"]
    sweep(load_recipe([], [*TINY, *grid, "runtime.precision=auto", f"run.dir={tmp_path}/s"]))
    assert "precision bf16, since this CPU multiplies 6.0 times" in capsys.readouterr().out
    folders = [tmp_path / "s", tmp_path / "s/seeds/0"]
    assert [RunFolder(folder).load().runtime.precision for folder in folders] == ["bf16", "bf16"]
    trial = json.loads((tmp_path / "s/trials/000.json").read_text())
    assert trial["recipe"]["runtime"]["precision"] == "bf16"
    machine(monkeypatch, 0.3)
    monkeypatch.setattr(cpu_speed, "_machine", lambda: "another")
    options = [*TINY, *grid, "runtime.precision=auto", f"run.dir={tmp_path}/s"]
    assert main(["sweep", *options]) == 0


def test_processes_of_unlike_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator_module, "gather_object", lambda own: [*own, "fp32"])
    recipe: Recipe = AUTO.changed("runtime", precision="bf16")
    with pytest.raises(UserError, match=r"auto: is bf16 for process 0 and fp32 for process 1, .*; set runtime\.precis"):
        accelerator_module._refuse_two_precisions(SimpleNamespace(), recipe)  # type: ignore[arg-type]
