"""Suites: what is planned, that each work item is done once, and that nothing is lost in a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from dist_vpt.cli.main import main
from dist_vpt.errors import RecipeError, RunFailed, UserError
from dist_vpt.experiments import sweep_worker
from dist_vpt.experiments.suite import suite
from dist_vpt.experiments.suite_plan import Experiment, check_roots, plan_experiments, task_recipes
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.results import Result, read
from tests.data.tfds_copies import elsewhere
from tests.forks import Forks, command
from tests.running import ROOT, few_images

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
TASKS = ("svhn", "dsprites_loc", "eurosat")
BUILDERS = ("svhn_cropped", "dsprites", "eurosat/rgb")
SMALL = (
    "data.check_counts=false", "data.image_size=16", "data.workers=0", "train.epochs=2",
    "optim.warmup_epochs=0", "backbone.name=test_vit", "train.batch_size=400",
    "run.trackers=[]", "sweep.grid={optim: {lr: [1.0, 0.1]}}", "sweep.seeds=[1, 2]", "method.dropout=0.0",
    "runtime.attention=eager",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets, and beside them weights of a small backbone."""
    folder = elsewhere(tmp_path_factory.mktemp("copies"), *BUILDERS)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "test_vit.pth")
    return folder


def small(root: Path, *more: str) -> list[str]:
    """Overrides of sweeps that are done in no time."""
    return [*SMALL, f"backbone.weights={root / 'test_vit.pth'}", *more]


def recipes(folder: Path) -> list[str]:
    """A reader and a writer that are trained in no time."""
    (folder / "reader.yaml").write_text("method: {name: vqt, queries: 1}\n")
    (folder / "writer.yaml").write_text("method: {name: vpt, prompts: 1, deep: false}\n")
    return [str(folder / "reader.yaml"), str(folder / "writer.yaml")]


def words(folder: Path, root: Path, *more: str) -> list[str]:
    return [
        "suite", *small(root, *more), "--tasks", *TASKS, "--method", *recipes(folder), "--root", str(root),
        "--out", str(folder / "suite"),
    ]  # fmt: skip


def results(folder: Path) -> dict[str, Result]:
    found, wrong = read(folder / "suite" / "results.jsonl")
    assert not wrong
    return {result.folder: result for result in found}


def comparable(folder: Path) -> dict[str, Any]:
    """What must not depend on who computed it, or when."""
    left_out = {"seconds", "finished", "peak_memory_mib", "device"}
    return {name: result.model_dump(exclude=left_out) for name, result in results(folder).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = command(words(folder, root), folder / "output.txt")
    assert run.finish() == [0], run.output
    return folder


def work_items(output: str) -> list[str]:
    """Lines of the log that begin a work item."""
    return [
        line
        for line in output.splitlines()
        if line.partition(": ")[2].partition(" ")[0] in ("trial", "trials", "seed", "seeds")
    ]


def test_status_tells_that_all_is_done(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(undisturbed), "--json"]) == 0
    whole, *sweeps = json.loads(capsys.readouterr().out)
    assert (whole["kind"], whole["status"], whole["done"], whole["total"]) == ("suite", "done", 6, 6)
    assert [(each["status"], each["done"], each["total"]) for each in sweeps] == [("done", 4, 4)] * 6


def test_a_split_that_is_missing_is_reported_before_a_trial_is_trained(tmp_path: Path) -> None:
    """And workers of a suite share no batch, whatever a recipe says of one sweep."""
    data = tmp_path / "data"
    data.mkdir()
    (few_images(data) / "val200.txt").rename(tmp_path / "val200.txt")
    line = [
        "suite", *SMALL, "backbone.weights=random", "data.format=vtab_folder", "sweep.parallelize=batch",
        "--tasks", "dtd", "--method", *recipes(tmp_path), "--root", str(data), "--out", str(tmp_path / "suite"),
    ]  # fmt: skip
    run = command(line, tmp_path / "output.txt")
    assert run.finish() == [3], run.output
    assert run.output.count("failed: split 'val' is missing") == 2
    assert not list((tmp_path / "suite").rglob("trials"))
    (tmp_path / "val200.txt").rename(data / "val200.txt")
    again = command(line, tmp_path / "again.txt")
    assert again.finish() == [0], again.output
    assert set(results(tmp_path)) == {"dtd/reader", "dtd/writer"}


def test_a_suite_ends_with_a_result_for_every_pair(undisturbed: Path) -> None:
    found = results(undisturbed)
    assert set(found) == {f"{task}/{method}" for task in TASKS for method in ("reader", "writer")}
    one = found["svhn/writer"]
    assert (one.task, one.group, one.method, one.backbone) == ("svhn", "natural", "writer", "test_vit")
    assert one.seeds == (1, 2)
    assert len(one.test["top1"].values) == 2
    assert one.protocol is not None
    assert one.protocol.storage == "tfds svhn_cropped:3.1.0 (tfrecord)"
    assert one.protocol.counts == {"train": 800, "val": 200, "trainval": 1000, "test": 60}
    assert (one.protocol.resize, one.protocol.normalize, one.protocol.trials, one.protocol.epochs) == (
        "vpt",
        "vpt",
        2,
        2,
    )
    assert one.parameters is not None
    assert one.parameters.trained == 64 + 65 * 10
    sweep = json.loads((undisturbed / "suite" / "svhn" / "writer" / "sweep.json").read_text())
    assert one.test["top1"].mean == sweep["test"]["top1"]["mean"]
    assert one.chosen == sweep["chosen"]
    output = (undisturbed / "output.txt").read_text()
    assert len(work_items(output)) == 3 * (1 + 1 + 2 + 2)
    assert (undisturbed / "suite" / "eurosat" / "reader" / "heatmap.png").exists()


def test_a_finished_suite_does_nothing_again(undisturbed: Path, root: Path) -> None:
    before = (undisturbed / "suite" / "results.jsonl").read_bytes()
    again = command(words(undisturbed, root), undisturbed / "again.txt")
    assert again.finish() == [0], again.output
    assert work_items(again.output) == []
    assert "dsprites_loc" in again.output  # the table
    assert (undisturbed / "suite" / "results.jsonl").read_bytes() == before


def test_killed_three_times_it_ends_alike(undisturbed: Path, root: Path, tmp_path: Path) -> None:
    when = random.Random(7)
    for _ in range(3):
        run = command(words(tmp_path, root), tmp_path / "output.txt")
        wanted = len(work_items(run.output)) + when.randint(1, 5)
        while len(work_items(run.output)) < wanted:
            assert run.running, run.output
            time.sleep(0.02)
        time.sleep(when.uniform(0, 0.5))
        run.send(signal.SIGKILL)
        assert run.finish() == [-signal.SIGKILL]
    last = command(words(tmp_path, root), tmp_path / "output.txt")
    assert last.finish() == [0], last.output
    assert comparable(tmp_path) == comparable(undisturbed)
    assert len((tmp_path / "suite" / "results.jsonl").read_text().splitlines()) == 6


def test_two_workers_do_each_item_once(undisturbed: Path, root: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "one.txt", tmp_path / "two.txt"]
    arguments = words(tmp_path, root)
    workers = [command(arguments, file) for file in outputs]
    assert [worker.finish() for worker in workers] == [[0], [0]], [file.read_text() for file in outputs]
    both = [work_items(file.read_text()) for file in outputs]
    assert all(both)  # neither was idle
    assert len(both[0] + both[1]) == len(set(both[0] + both[1])) == 18
    assert comparable(tmp_path) == comparable(undisturbed)


def test_a_stop_is_obeyed_and_gone_on_from(undisturbed: Path, root: Path, tmp_path: Path) -> None:
    run = command(words(tmp_path, root), tmp_path / "output.txt")
    while "svhn/writer: trial 1" not in run.output and run.running:
        time.sleep(0.05)
    run.send(signal.SIGTERM)
    assert run.finish() == [75], run.output
    assert "the same command resumes" in run.output
    assert command(words(tmp_path, root), tmp_path / "more.txt").finish() == [0]
    assert comparable(tmp_path) == comparable(undisturbed)


def test_one_bad_dataset_does_not_stop_the_others(root: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    subprocess.run(["cp", "-r", root, copies], check=True)
    file = next(copies.glob("dsprites/*/*train*"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 3])
    run = command(words(tmp_path, copies), tmp_path / "output.txt")
    assert run.finish() == [RunFailed.exit_code], run.output
    assert "2 of 6 have no result" in run.output
    found = results(tmp_path)
    assert [name for name, result in found.items() if result.failed] == ["dsprites_loc/reader", "dsprites_loc/writer"]
    assert "copy the file again" in str(found["dsprites_loc/writer"].failed)
    file.write_bytes(whole)
    again = command(words(tmp_path, copies), tmp_path / "again.txt")
    assert again.finish() == [0], again.output
    assert {line.split("/")[0] for line in work_items(again.output)} == {"dsprites_loc"}
    assert not any(result.failed for result in results(tmp_path).values())


def started(folder: Path, root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, on svhn alone."""
    arguments = [*words(folder, root), *more]
    arguments[arguments.index("--tasks") + 1 : arguments.index("--method")] = ["svhn"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "dist_vpt", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_workers_are_started(root: Path, tmp_path: Path) -> None:
    done = started(tmp_path, root, "--workers", "2")
    assert len(work_items(done.stdout)) == 6
    assert len(results(tmp_path)) == 2


def test_another_recipe_is_refused(undisturbed: Path, root: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json: svhn/reader and 5 more was begun with another recipe; choose"):
        run_here(undisturbed, root, "seed=5")
    before = (undisturbed / "suite" / "manifest.json").read_bytes()
    assert json.loads(before)["pairs"]["svhn/writer"]["trials"] == 2


def run_here(folder: Path, root: Path, *more: str) -> None:
    experiments = plan_experiments(TASKS, recipes(folder), small(root, *more), str(root), str(folder / "suite"))
    suite(experiments, str(folder / "suite"), workers=1, arguments=[])


def test_tasks_by_name_group_and_file(tmp_path: Path) -> None:
    assert len(task_recipes(["vtab"])) == 19
    assert [name for name, _ in task_recipes(["kitti,dtd"])] == ["dtd", "kitti"]
    assert len(task_recipes(["natural", "cifar100", "fgvc"])) == 12
    assert [name for name, _ in task_recipes(["shapes_loc", "structured", "digits"])][:2] == ["digits", "shapes_loc"]
    assert len(task_recipes(["shapes_loc", "structured", "digits"])) == 2 + 8
    own = tmp_path / "mine.yaml"
    own.write_text("data: {task: digits}\n")
    assert task_recipes([str(own), "dtd"])[1] == ("mine", str(own))
    with pytest.raises(
        UserError, match=r"--tasks dtdd: neither a task, a group nor a recipe file; did you mean 'dtd'\?"
    ):
        task_recipes(["dtdd"])
    with pytest.raises(
        UserError, match=r"vpt_dep: neither a file nor the name of a method recipe; did you mean 'vpt_deep'"
    ):
        plan_experiments(["dtd"], ["vpt_dep"], [], "somewhere", "out")


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        plan_experiments(["dtd", "svhn"], ["linear"], ["train.epochs=0"], "somewhere", "out")
    assert str(caught.value).count("train.epochs = 0") == 2
    with pytest.raises(RecipeError, match=r"^--root DIR is missing: the folder that contains the datasets$"):
        plan_experiments(["dtd", "svhn"], ["linear"], [], None, "out")
    with pytest.raises(UserError, match="dtd/linear is listed twice; list each once"):
        plan_experiments(["dtd"], ["linear", "linear"], [], "somewhere", "out")
    backbone = str(ROOT / "configs" / "backbone" / "vit_b16_in21k.yaml")
    with pytest.raises(UserError, match=r"--method .*vit_b16_in21k.yaml: sets no method; put other recipes before"):
        plan_experiments(["dtd"], ["linear", backbone], [], "somewhere", "out")
    assert [
        experiment.method for experiment in plan_experiments(["dtd"], ["vpt_deep", "side"], [], "somewhere", "out")
    ] == [
        "vpt_deep",
        "side",
    ]


def test_what_a_plan_costs() -> None:
    def images(method: str, task: str = "dtd", *more: str) -> int | None:
        return plan_experiments([task], [method], list(more), "somewhere", "out")[0].images()

    assert images("vpt_deep") == 40 * 100 * (800 + 200) + 5 * (100 * 1000 + 1880)
    assert images("vpt_deep", "dtd", "train.eval_every=50") == 40 * (100 * 800 + 2 * 200) + 5 * (100 * 1000 + 1880)
    assert images("vqt") == 800 + 200 + 1000 + 1880
    assert images("vqt", "dtd", "stream.cache=none") == 100 * (800 + 200) + 100 * 1000 + 1880
    assert images("vpt_deep", "cub") is None
    assert images("vqt", "shapes_ori") == 800 + 200 + 1000 + 1000
    few = ("data.shots=8", "data.tries=3")
    assert images("vqt", "cub", *few) == 1600 + 800 + 3 * (1600 + 800 + 5794)
    assert images("vpt_deep", "dtd", *few) == 40 * 100 * (376 + 188) + 3 * (100 * (376 + 188) + 1880)
    assert images("vpt_deep", "dtd", "data.fraction=0.5") == 40 * 100 * (400 + 200) + 5 * (100 * 600 + 1880)


def test_the_plan_is_shown_and_nothing_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "suite"
    code = main(["suite", "--tasks", "vtab", "--method", "vpt_deep", "--root", "x", "--out", str(out), "--dry-run"])
    output = capsys.readouterr().out
    assert code == 0
    assert "19 sweeps, with backbone demo" in output
    assert "760 trials and 95 seeds, 87,439,520 images" in " ".join(output.split())
    assert not out.exists()


@pytest.mark.parametrize("root", [(), ("--root", "x")])
def test_a_task_without_a_folder_is_planned(
    root: tuple[str, ...], tmp_path: Path, write: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside one that has one; the folder is that of the others."""
    file = write("mine.yaml", "data:\n  task: digits\n")
    tasks = ["--tasks", "dtd", str(file), "--method", "linear"]
    assert main(["suite", *tasks, *root, "--out", str(tmp_path / "suite"), "--dry-run"]) == 0
    assert "2 sweeps, with backbone demo" in capsys.readouterr().out
    roots = [one.recipe.data.root for one in plan_experiments(tasks[1:3], ["linear"], [], "x", "out")]
    assert roots == ["x", None]
    roots = [one.recipe.data.root for one in plan_experiments(["dtd", "shapes_ori"], ["linear"], [], "x", "out")]
    assert roots == [None, "x"]  # shapes come first


def test_a_dry_run_needs_no_torch() -> None:
    code = (
        "import sys; from dist_vpt.cli.main import main;"
        "main(['suite', '--tasks', 'vtab', '--method', 'vpt_deep', 'vqt', '--root', 'x', '--dry-run']);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_a_job_array_has_an_element_for_each_experiment(tmp_path: Path) -> None:
    file = tmp_path / "suite.sbatch"
    words = [
        "suite",
        "train.epochs=7",
        "optim.warmup_epochs=0",
        "--tasks",
        "natural",
        "--method",
        "vqt",
        "--root",
        "x y",
    ]
    assert main([*words, "--slurm", str(file)]) == 0
    text = file.read_text()
    assert "#SBATCH --array=0-6\n" in text
    line = (
        "suite_in_job train.epochs=7 optim.warmup_epochs=0 --tasks natural --method vqt --out runs/suite --root 'x y'"
    )
    assert text.endswith(f"\n{line}\n")
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert main([*words, "--slurm", str(file), "--workers", "2"]) == 0
    assert file.read_text().endswith(f"\n{line} --workers 2\n")
    assert main([*words, "--slurm", str(file), "--index", "2"]) == 2


def test_an_element_does_its_own_experiment(root: Path, tmp_path: Path) -> None:
    experiments = plan_experiments(
        ["svhn", "eurosat"], recipes(tmp_path)[:1], small(root), str(root), str(tmp_path / "suite")
    )
    run = Forks(
        1, lambda rank: suite(experiments, str(tmp_path / "suite"), index=1, arguments=[]), tmp_path / "output.txt"
    )
    assert run.finish() == [0], run.output
    assert list(results(tmp_path)) == ["eurosat/reader"]
    with pytest.raises(UserError, match="--index 2: the suite has the elements 0 to 1"):
        suite(experiments, str(tmp_path / "suite"), index=2, arguments=[])


def test_the_key_does_not_depend_on_places() -> None:
    def key(*more: str, out: str = "out", root: str = "here") -> str:
        experiment: Experiment = plan_experiments(["dtd"], ["linear"], list(more), root, out)[0]
        return experiment.key

    assert key() == key("data.workers=9", out="elsewhere", root="there")
    assert key() != key("optim.weight_decay=0.5")


def test_an_element_is_kept_by_the_workers_it_starts(root: Path, tmp_path: Path) -> None:
    done = started(tmp_path, root, "--index", "0", "--workers", "2")
    assert list(results(tmp_path)) == ["svhn/reader"]
    assert done.stdout.count("compares them with published numbers") == 1  # one table, by the one who was asked


def test_a_damaged_outcome_fails_its_experiment_alone(undisturbed: Path, root: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", undisturbed / "suite", tmp_path / "suite"], check=True)
    for name in ("manifest.json", "results.jsonl"):
        (tmp_path / "suite" / name).unlink()
    outcome = tmp_path / "suite" / "svhn" / "writer" / "trials" / "000.json"
    outcome.write_text("{}")
    run = command(words(tmp_path, root), tmp_path / "output.txt")
    assert run.finish() == [RunFailed.exit_code], run.output
    assert "1 of 6 have no result" in run.output
    assert "000.json: damaged (it has no 'best'); remove it, and its trial is trained again" in run.output
    assert [name for name, result in results(tmp_path).items() if result.failed] == ["svhn/writer"]


def test_what_nobody_expected_fails_its_experiment_alone(root: Path, tmp_path: Path) -> None:
    def out_of_memory(rank: int) -> None:
        whole = sweep_worker.Worker.work

        def work(self: sweep_worker.Worker, jobs: Any) -> None:
            if self.recipe.data.task == "eurosat":
                raise MemoryError("no more of it")
            whole(self, jobs)

        sweep_worker.Worker.work = work  # type: ignore[method-assign]

    arguments = words(tmp_path, root)
    arguments.remove("dsprites_loc")
    run = command(arguments, tmp_path / "output.txt", before=out_of_memory)
    assert run.finish() == [RunFailed.exit_code], run.output
    assert "2 of 4 have no result" in run.output
    assert "eurosat/writer: MemoryError: no more of it (traceback in " in run.output
    output = tmp_path / "suite" / "claims" / "eurosat__writer__traceback"
    assert "raise MemoryError" in output.read_text()
    assert {name for name, result in results(tmp_path).items() if result.failed} == {"eurosat/reader", "eurosat/writer"}


def test_a_full_disk_fails_its_experiment_alone(root: Path, tmp_path: Path) -> None:
    """Also where there is no space to write the failure down."""

    def full(rank: int) -> None:
        work, write = sweep_worker.Worker.work, Path.write_text
        disk_full = OSError(28, "No space left on device")

        def worked(self: sweep_worker.Worker, jobs: Any) -> None:
            if self.recipe.method.name == "vpt":
                raise disk_full
            work(self, jobs)

        def written(self: Path, *args: Any, **kwargs: Any) -> int:
            if self.parent.name == "claims":
                raise disk_full
            return write(self, *args, **kwargs)

        sweep_worker.Worker.work, Path.write_text = worked, written  # type: ignore[method-assign, assignment]

    arguments = words(tmp_path, root, "train.epochs=1", "sweep.seeds=[1]")
    arguments[arguments.index("--tasks") + 1 : arguments.index("--method")] = ["svhn"]
    run = command(arguments, tmp_path / "output.txt", before=full)
    assert run.finish() == [RunFailed.exit_code], run.output
    assert "1 of 2 have no result:\n  svhn/writer: OSError: [Errno 28] No space left on device" in run.output
    assert "warning: this could not be written down ([Errno 28] No space left on device)" in run.output
    assert list(results(tmp_path)) == ["svhn/reader"]
    run = command(arguments, tmp_path / "again.txt")
    assert run.finish() == [0], run.output


def test_processes_of_a_launcher_are_workers(root: Path, tmp_path: Path) -> None:
    arguments = words(tmp_path, root)
    arguments[arguments.index("--tasks") + 1 : arguments.index("--method")] = ["svhn"]
    run = command(arguments, tmp_path / "output.txt", strategy="ddp")
    assert run.finish() == [0, 0], run.output
    assert len(work_items(run.output)) == len(set(work_items(run.output))) == 6


def test_an_own_task_may_inherit_another_method(tmp_path: Path) -> None:
    own = ROOT / "configs" / "quickstart.yaml"
    (experiment,) = plan_experiments([str(own)], ["linear"], ["backbone.drop_path=0.0"], None, "out")
    assert (experiment.name, experiment.recipe.method.name, experiment.recipe.train.epochs) == (
        "quickstart/linear",
        "linear",
        30,
    )


def test_a_damaged_manifest_is_reported(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "suite" / "manifest.json"
    file.parent.mkdir()
    for damage in ("{}", '{"pairs"', '{"pairs": {"svhn/reader": 3}}'):
        file.write_text(damage)
        with pytest.raises(UserError, match=r"manifest.json: damaged .*; remove it: finished experiments are kept"):
            run_here(tmp_path, root)


def test_places_that_cannot_be(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--root .*nowhere: is not a folder; name the one that contains the datasets"):
        run_here(tmp_path, root / "nowhere")
    one = tmp_path / "one"
    one.mkdir()
    (one / "train800.txt").write_text("")
    with pytest.raises(UserError, match=r"is one task's folder \(train800.txt\), and 3 tasks are listed"):
        run_here(tmp_path, one)
    with pytest.raises(UserError, match="--workers 0: must be at least 1"):
        suite(plan_experiments(TASKS, recipes(tmp_path), small(root), str(root), "out"), "out", workers=0, arguments=[])
    with pytest.raises(UserError, match="--tasks ,: names no task"):
        task_recipes([","])
    file = tmp_path / "file"
    file.write_text("")
    assert main(["suite", "--tasks", "dtd", "--method", "vqt", "--root", "x", "--slurm", str(file / "x.sh")]) == 2


def test_what_the_key_is_of_depends_on_the_storage(root: Path, tmp_path: Path) -> None:
    """Results of prepared datasets and of vtab-1k folders are never taken for each other."""

    def planned(*more: str) -> list[Experiment]:
        return plan_experiments(
            ["svhn"], recipes(tmp_path)[:1], small(root, "train.epochs=1", *more), str(root), str(tmp_path / "suite")
        )

    suite(planned(), str(tmp_path / "suite"), workers=1, arguments=[])
    kept = results(tmp_path)["svhn/reader"]
    assert kept.run != planned()[0].key
    assert kept.run == planned("data.format=tfds")[0].key


def test_an_address_is_not_looked_for_on_this_machine() -> None:
    keys = ["data.task=mine", "data.format=webdataset", "data.root=https://host/shards"]
    check_roots([Experiment("mine", "linear", load_recipe([], keys))])  # raises nothing
