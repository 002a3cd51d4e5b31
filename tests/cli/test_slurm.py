"""Jobs on a real Slurm of two nodes, where its programs are; what scripts and checks say, everywhere."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dist_vpt.cli import slurm_node as node
from dist_vpt.cli.main import main
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.launcher import node_exit_code
from dist_vpt.experiments.suite_plan import plan_experiments
from dist_vpt.runs.results import FILE, Result, append, read
from tests.cli import slurm_cluster
from tests.cli.slurm_cluster import PATH, PROGRAMS, Cluster, Unavailable
from tests.forks import command
from tests.running import ROOT, step_losses, train, wait_for, words

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LAUNCH = ROOT / "launch"
OPTIONS = ("train.batch_size=60", "train.epochs=2", "run.save_every=4")  # 34 steps
EPOCH = 17  # steps
LOADED = ("data.workers=1", "data.cache=none")
CPUS = ("--gpus-per-node=0", "--cpus-per-task=4")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        with Cluster() as started:
            yield started
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(folder, *OPTIONS)
    return folder


def equal(folder: Path, alone: Path) -> None:
    """Every step's loss is that of one process that nothing has disturbed."""
    one, other = step_losses(alone), step_losses(folder)
    assert len(one) == len(other) == 34
    assert other == pytest.approx(one, abs=1e-4)
    ours, theirs = (json.loads((run / "result.json").read_text()) for run in (folder, alone))
    for split, scores in theirs["last"].items():
        assert ours["last"][split] == pytest.approx(scores, abs=1e-4)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("script", "strategy", "processes"),
    [("single_node", "single", 1), ("multi_node", "ddp", 2), ("multi_node", "zero2", 2)],
)
def test_a_job_equals_a_local_run(  # noqa: PLR0917 (fixtures)
    script: str, strategy: str, processes: int, cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = [*(["zero2"] if strategy == "zero2" else []), *words(folder, *OPTIONS)]
    job = cluster.submit(LAUNCH / f"slurm_{script}.sbatch", *argv, options=CPUS)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    equal(folder, alone)
    result = json.loads((folder / "result.json").read_text())
    assert (result["strategy"], result["processes"]) == (strategy, processes)
    before = (folder / "result.json").read_bytes()
    if strategy == "zero2":  # starts as ddp does
        return
    if processes == 1:
        log = cluster.run(str(LAUNCH / "slurm_interactive.sh"), *CPUS, "--", *argv)
    else:
        job = cluster.submit(LAUNCH / f"slurm_{script}.sbatch", *argv, options=CPUS)
        assert cluster.wait(job)["ExitCode"] == "0:0"
        log = cluster.log(job)
    assert f"{folder}: done already; its numbers are in {folder}/result.json" in log
    assert (folder / "result.json").read_bytes() == before


def step(folder: Path, steps: int = 34) -> int:
    """The newest step in the log of a run."""
    log = folder / "train.log"
    told = re.findall(rf" step (\d+)/{steps} ", log.read_text()) if log.exists() else []
    return int(told[-1]) if told else 0


def resumed(folder: Path) -> list[int]:
    """The steps at which attempts have gone on."""
    return [int(step) for step in re.findall(r"resumed from \S+ at step (\d+)", (folder / "train.log").read_text())]


# Found by Python where it starts, in the processes that train: the first attempts take their time.
SLOWLY = """
import os, sys
if sys.orig_argv[2:4] == ["-m", "dist_vpt.train"] and os.environ["SLURM_JOB_NAME"] == "disturbed":
    import time
    from dist_vpt.training import engine
    seconds, step = (2.0, 1.0, 0.5, 0.0)[int(os.environ.get("SLURM_RESTART_COUNT", "0"))], engine.train_step
    def slowly(*arguments, **named):
        time.sleep(seconds)
        return step(*arguments, **named)
    engine.train_step = slowly
"""


@pytest.mark.slurm
def test_a_job_that_is_stopped_started_again_and_killed_equals_a_local_run(
    cluster: Cluster, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time limit comes, then a requeue in mid-epoch, then the end of one node's process; by `launch slurm`."""
    folder = tmp_path / "disturbed"
    (tmp_path / "sitecustomize.py").write_text(SLOWLY)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', ROOT)}")
    options = words(folder, *OPTIONS, *LOADED)
    submitted = time.monotonic()
    assert main(["launch", "slurm", *options, "--nodes", "2", "--gpus-per-node", "0", "--time", "10"]) == 0
    job = capsys.readouterr().out.split()[1]
    log = tmp_path / f"disturbed-{job}.log"
    try:
        wait_for(lambda: step(folder) >= 3)
        # From now on the limit is one to two minutes away, and the signal is due two minutes before it.
        limit = int((time.monotonic() - submitted) // 60) + 2
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
        wait_for(lambda: "attempt 2 of 10," in log.read_text())
        assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
        at = step(folder)
        wait_for(lambda: step(folder) >= at + 3 and 3 <= step(folder) % EPOCH <= 13)
        cluster.run("scontrol", "requeue", job)
        wait_for(lambda: "attempt 3 of 10," in log.read_text())
        assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
        at = step(folder)
        wait_for(lambda: step(folder) >= at + 3)
        (victim,) = [
            p for p in cluster.processes() if p.environ().get("RANK") == "1" and "dist_vpt.train" in p.cmdline()
        ]
        victim.send_signal(signal.SIGKILL)
        assert cluster.wait(job)["JobState"] == "COMPLETED"
    finally:
        print(log.read_text() if log.exists() else "no log")
    assert cluster.job(job)[0]["Restarts"] == "3"
    _, requeued, _ = resumed(folder)
    assert requeued % EPOCH
    equal(folder, alone)
    assert "process 1 was ended by signal 9 (Killed)" in log.read_text()


ELEMENTS = 8
LEFT = (1, 4, 7)


def results(folder: Path) -> dict[str, Result]:
    found, wrong = read(folder / FILE)
    assert not wrong
    return {result.folder: result for result in found}


@pytest.mark.slurm
def test_an_array_does_a_suite(cluster: Cluster, tmp_path: Path) -> None:
    """Of eight sweeps five are done already: their elements end at once, the others compute. Two at a time."""
    tasks = [tmp_path / f"task{number:02}.yaml" for number in range(ELEMENTS)]
    for number, task in enumerate(tasks):
        task.write_text(f"seed: {number}\ndata: {{format: digits, image_size: 8, workers: 0}}\n")
    common = ["train.epochs=1", "optim.warmup_epochs=0", "train.batch_size=500", "run.trackers=[]"]
    common += ["sweep.grid={optim: {lr: [0.1]}}", "sweep.seeds=[1]", "runtime.attention=eager"]
    left = [tasks[number] for number in LEFT]
    argv = [*common, "--tasks", *map(str, left), "--method", "linear", "--out", str(tmp_path / "local")]
    local = command(["suite", *argv], tmp_path / "output.txt")
    assert local.finish() == [0], local.output
    expected = results(tmp_path / "local")
    (tmp_path / "array").mkdir()
    for number, pair in enumerate(plan_experiments(list(map(str, tasks)), ["linear"], common, None, "out")):
        if number not in LEFT:
            done = expected[f"{left[0].stem}/linear"].model_copy(update={"run": pair.key, "folder": pair.name})
            append(tmp_path / "array" / FILE, done)
    argv = [*common, "--tasks", *map(str, tasks), "--method", "linear", "--out", str(tmp_path / "array")]
    options = [f"--array=0-{ELEMENTS - 1}%2", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = cluster.submit(LAUNCH / "slurm_array.sbatch", *argv, options=options)
    cluster.wait(job)
    elements = cluster.job(job)
    assert sorted(int(element["ArrayTaskId"]) for element in elements) == list(range(ELEMENTS))
    assert {element["JobState"] for element in elements} == {"COMPLETED"}, cluster.log(f"{job}_3")
    spans = [(element["StartTime"], element["EndTime"]) for element in elements]
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) <= 2
    found = results(tmp_path / "array")
    assert len(found) == ELEMENTS
    for name, result in expected.items():
        assert found[name].run == result.run
        assert found[name].val == pytest.approx(result.val, abs=1e-4)
        for metric, spread in result.test.items():
            assert found[name].test[metric].mean == pytest.approx(spread.mean, abs=1e-4)
    began = [number for number in range(ELEMENTS) if "linear: trials" in cluster.log(f"{job}_{number}")]
    assert tuple(began) == LEFT


@pytest.mark.slurm
def test_fewer_gpus_than_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's GPUs are twins of /dev/null here, which torch does not see: that is reported, and nothing tried again."""
    if not cluster.gpus:
        pytest.skip("no device files can be made here")
    options = ["--gpus-per-node=2", "--cpus-per-task=1"]
    job = cluster.submit(LAUNCH / "slurm_multi_node.sbatch", *words(tmp_path / "run"), options=options)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "slurm: n1: 2 GPUs were requested and torch sees 0; exclude this node" in cluster.log(job)
    assert not (tmp_path / "run").exists()


@pytest.mark.slurm
def test_nothing_of_a_cluster_is_left_behind(tmp_path: Path) -> None:
    """Not even what a job has detached from itself."""
    script = tmp_path / "detached.sbatch"
    script.write_text("#!/bin/bash\nsetsid sleep 600 &\nsrun --ntasks-per-node=1 bash -c 'setsid sleep 600 & wait'\n")
    try:
        with Cluster() as cluster:
            cluster.submit(script, options=["--nodes=2"])
            wait_for(lambda: [p.name() for p in cluster.processes()].count("sleep") == 3)
            assert cluster.marks()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert cluster.processes() == []
    assert cluster.marks() == []
    assert not cluster.root.exists()


# Without Slurm


def test_a_slurm_that_does_not_start_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its programs are not there at all, tests are skipped."""
    monkeypatch.setattr(slurm_cluster, "PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="no munged here"):
        Cluster()
    for name in PROGRAMS:
        (tmp_path / name).write_text('#!/bin/bash\ncase "$*" in *munged*) echo no right to; exit 1 ;; esac\n')
        (tmp_path / name).chmod(0o755)
    cluster = Cluster()
    cluster.apart = False
    with pytest.raises(AssertionError, match=r"munged did not start .*no right to"), cluster:
        pass


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_bash_and_say_no_hyperparameter(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    code = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    assert re.findall(r"\b(?:optim|train|method|data|backbone|runtime)\.\w+=", "\n".join(code)) == []


FAKES = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; echo "step: $*"'
    '; if [ "$1" = bash ]; then rm -f here.yaml; SLURMD_NODENAME=n2 exec "$@"; fi; exit "$STEP"',
    "scontrol": 'case "$1 $2" in "show hostnames") echo n1 ;; "show node") echo "A=b NodeAddr=localhost X=y" ;;'
    ' *) echo "scontrol $*"; exit 1 ;; esac',
}


def in_job(folder: Path, *argv: str, call: str = "train_in_job", **variables: str) -> subprocess.CompletedProcess[str]:
    """A script's call in what looks like a job. The step ends with exit code STEP; Slurm refuses what it is asked."""
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "SLURMD_NODENAME": "n1", "STEP": "0"},
        **variables,
    }
    line = ["bash", "-c", f'source {LAUNCH}/slurm.sh; {call} "$@"', "job", *argv]
    return subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("variables", "code", "again"),
    [
        ({"STEP": "0"}, 0, False),
        ({"STEP": "1"}, 1, True),
        ({"STEP": "235"}, 75, True),  # stopped, its state saved
        ({"STEP": "254"}, 94, True),  # a process was killed
        ({"STEP": "137"}, 137, True),  # the launcher was
        ({"STEP": "162"}, 2, False),  # a mistake to fix
        ({"STEP": "163"}, 3, False),  # a loss that is not finite
        ({"STEP": "164"}, 4, True),  # a process of another node was killed
        ({"STEP": "235", "SLURM_RESTART_COUNT": "8"}, 75, True),
        ({"STEP": "235", "SLURM_RESTART_COUNT": "9"}, 75, False),
        ({"STEP": "0", "SLURM_RESTART_COUNT": "10"}, 2, False),
        ({"STEP": "235", "SLURM_RESTART_COUNT": "10", "ATTEMPTS": "20"}, 75, True),
        ({"STEP": "235", "ATTEMPTS": "1"}, 75, False),
    ],
    ids=lambda value: " ".join(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else "",
)
def test_attempts_are_counted_and_bounded(variables: dict[str, str], code: int, again: bool, tmp_path: Path) -> None:
    done = in_job(tmp_path, *words(tmp_path / "run"), python="true", **variables)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("scontrol requeue 7\n" in done.stdout) == again
    count = int(variables.get("SLURM_RESTART_COUNT", "0"))
    if count < int(variables.get("ATTEMPTS", "10")):
        assert f"job 7, attempt {count + 1} of " in done.stdout
        assert f"node train {LAUNCH}/accelerate/ddp.yaml" in done.stdout
        assert f"run.dir={tmp_path}/run run.resume=auto\n" in done.stdout
    else:
        assert "slurm: job 7 was started 10 times and ATTEMPTS=10; submit it again to continue" in done.stderr
        assert "step: " not in done.stdout


@pytest.mark.parametrize(
    ("argv", "variables", "message"),
    [
        ([], {}, "no recipe; everything after the script's name goes to train or suite"),
        (["a.yaml"], {"SLURM_JOB_ID": ""}, "not in a Slurm job; start it with sbatch"),
        (["a.yaml"], {"ATTEMPTS": "many"}, "ATTEMPTS=many: must be a whole number from 1 on"),
        (
            ["a.yaml"],
            {"python": "/bin/false"},
            "n1: environment not activated: /bin/false has no dist_vpt; activate it",
        ),
        (["a.yaml"], {"python": "nopython"}, "n1: environment not activated: no nopython here, which has no dist_vpt"),
        (["a.yaml"], {}, "n1: 1 mistake in the recipe:\n  command line: a.yaml: no such recipe file"),
        (
            ["seed=1"],
            {"MASTER_ADDR": "no.such.host.invalid"},
            "n1: the first node's name no.such.host.invalid cannot be",
        ),
        (["seed=1"], {"MASTER_PORT": "seventy"}, "n1: port seventy cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_keeps_a_job_from_starting(
    argv: list[str], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = in_job(tmp_path, *argv, **variables)
    assert done.returncode == 2
    assert f"slurm: {message}" in done.stderr
    assert done.stderr.count("slurm: ") == 1
    assert "step: " not in done.stdout


def test_a_recipe_that_another_node_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "here.yaml").write_text("seed: 1\n")
    done = in_job(tmp_path, "here.yaml", SLURM_NNODES="2")
    assert done.returncode == 2
    assert "slurm: n2: 1 mistake in the recipe:\n  command line: here.yaml: no such recipe file" in done.stderr
    assert "node train" not in done.stdout


def test_every_node_is_checked_and_an_element_has_its_sweep(tmp_path: Path) -> None:
    done = in_job(tmp_path, "seed=1", SLURMD_NODENAME="")  # salloc's command runs on no node
    assert "_check_node" in done.stdout
    done = in_job(tmp_path, "zero2", "seed=1", SLURM_NNODES="2")
    steps = [line for line in done.stdout.splitlines() if line.startswith("step: ")]
    assert len(steps) == 2
    assert "_check_node" in steps[0]
    assert f"node train {LAUNCH}/accelerate/zero2.yaml seed=1 run.resume=auto" in steps[1]
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "STEP": "75"}
    done = in_job(tmp_path, "--tasks", "dtd", call="suite_in_job", **array)
    assert "-m dist_vpt suite --tasks dtd --index 3\n" in done.stdout
    assert "scontrol requeue 5_3\n" in done.stdout
    done = in_job(tmp_path, "--tasks", "dtd", "--workers", "1", call="suite_in_job", **array)
    assert "-m dist_vpt suite --tasks dtd --workers 1\n" in done.stdout
    done = in_job(tmp_path, "--tasks", "dtd", "--workers=1", call="suite_in_job", **array)
    assert "-m dist_vpt suite --tasks dtd --workers=1\n" in done.stdout


def test_checks_of_a_node(capsys: pytest.CaptureFixture[str], tmp_path: Path, alone: Path) -> None:
    def check(*argv: str, **more: str) -> int:
        return node.check(argv, LaunchEnv.parse(variables | more))

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {"SLURMD_NODENAME": "n2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        assert check("seed=1", SLURM_NODEID="1") == 0  # the first node's port alone matters
        assert check("seed=1", SLURM_GPUS_ON_NODE="1000") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.match(rf"slurm: n2: port {port} cannot be used \(.*in use\); choose a free one: MASTER_PORT=", lines[0])
    assert re.match(r"slurm: n2: 1000 GPUs were requested and torch sees \d+; exclude this node", lines[1])
    assert check(*words(alone, *OPTIONS, "run.resume=auto")) == node.ALREADY_DONE
    lost = shutil.copytree(alone, tmp_path / "lost")
    (lost / "result.json").unlink()
    assert check(*words(lost, *OPTIONS, "run.resume=auto")) == 2  # done, and its result is gone
    assert f"slurm: n2: {lost}/result.json: cannot be read (No such file" in capsys.readouterr().err
    assert check(*words(alone, *OPTIONS, "seed=9")) == 0  # train compares recipes, and reports this


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: 75, 1: 75}, 235),
        ({0: 2}, 162),
        ({0: 1, 1: -9}, 254),  # what failed because of a killed one does not hide it
        ({0: 3, 1: -11}, 254),
        ({0: 4, 1: 3}, 163),  # nor what another met because of it
        ({0: 4, 1: -15}, 164),
        ({0: 75, 1: -15}, 235),  # ended by the launcher after the other
        ({0: -15}, 143),
        ({0: 130}, 130),
    ],
)
def test_exit_code_of_a_node(codes: dict[int, int], expected: int) -> None:
    assert node_exit_code(codes) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_who_loads_images_outlives_a_signal_to_the_whole_job(number: signal.Signals, tmp_path: Path) -> None:
    """Slurm sends it to every process of a step; the one that trains saves its state. No worker outlives that one."""
    folder = tmp_path / "run"
    forks = command(["train", *words(folder, *OPTIONS, "train.epochs=30", *LOADED)], tmp_path / "output.txt")
    wait_for(lambda: step(folder, 510) >= 2 or not forks.running)
    assert forks.running, forks.output[-3000:]
    (trainer,) = [psutil.Process(process.pid) for process in forks.processes]
    below = trainer.children(recursive=True)
    assert len(below) >= 2  # a server and a worker; a tracker of shared memory, unless it was there before
    for process in (trainer,) if number == signal.SIGKILL else (*below, trainer):
        process.send_signal(number)
    assert forks.finish(60) == [-9 if number == signal.SIGKILL else 75], forks.output[-2000:]
    assert psutil.wait_procs(below, timeout=20)[1] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: must be at least 0"),
        (["--max-restarts", "-1"], "--max-restarts -1: must be at least 0"),
        (["--strategy", "zero4"], "--strategy zero4: no such strategy; did you mean 'zero"),
        (
            ["--time", "soon"],
            "--time soon: must be as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds,",
        ),
        (["--time", "2"], "--time 2: must be 180 seconds or more"),
        (["--time", "0:02:59"], "--time 0:02:59: must be 180 seconds or more"),
        (["--nodes", "3"], "train.batch_size = 64: must be a multiple of 3 = 3 nodes x 1 processes x 1 accumulated"),
        (["seeds=1"], "command line: seeds = 1: unknown key"),
        (["runtime.precision=fp16", "--strategy", "zero2"], "--strategy zero2: runtime.precision = fp16: DeepSpeed"),
        (
            ["runtime.activation_checkpointing=budget-0.5", "--strategy", "zero3"],
            "runtime.activation_checkpointing = budget-0.5: ZeRO-3",
        ),
        (["method.name=vqt", "--strategy", "zero3"], "method.name = vqt: reads the weights inside the blocks"),
        (["runtime.device=cpu", "--strategy", "zero2"], "runtime.device = cpu: Accelerate switches DeepSpeed off"),
        ([], "sbatch: not found; run this on a node from which jobs are submitted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_submitted(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    given = ["train.batch_size=64", f"run.dir={tmp_path}/run", "--time", "30"]
    assert main(["launch", "slurm", *given, *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_launch_writes_and_submits_what_the_dry_run_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "a b"
    line = ["launch", "slurm", f"run.dir={run}", "data.workers=3", "--nodes", "2", "--gpus-per-node", "4"]
    line += ["--time", "4:00:00", "--strategy", "zero3", "--max-restarts", "4"]
    assert main([*line, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not run.parent.exists()
    said = dict(line[8:].partition("=")[::2] for line in shown.splitlines() if line.startswith("#SBATCH "))
    assert said == {
        "--job-name": '"a b"', "--nodes": "2", "--gpus-per-node": "4", "--ntasks-per-node": "1",
        "--cpus-per-task": "16", "--time": "4:00:00", "--signal": "B:USR1@120", "--requeue": "",
        "--open-mode": "append", "--output": f'"{run}-%j.log"',
    }  # fmt: skip
    assert f"\nATTEMPTS=5\nsource {LAUNCH}/slurm.sh || exit 2\ntrain_in_job zero3 'run.dir={run}' data.work" in shown
    assert f"mkdir -p {run.parent}\n" in shown
    subprocess.run(["bash", "-n"], input=shown, text=True, check=True)
    for code, told in ((0, f"job 12 of {run}.sbatch, log in {run}-12.log\n"), (1, "refused by sbatch (no such part)")):
        (tmp_path / "sbatch").write_text(
            f"#!/bin/bash\n[ -f \"$2\" ] && echo '12;big'; echo no such part >&2; exit {code}"
        )
        (tmp_path / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert main(line) == (2 if code else 0)
        assert told in "".join(capsys.readouterr())
        assert run.with_name("a b.sbatch").read_text() == shown


@pytest.mark.skipif(shutil.which("sbatch", path=PATH) is None, reason="no sbatch here (apt-get install slurm-client)")
def test_sbatch_reads_what_launch_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads the whole script before it finds that nobody listens."""
    name = 'a "b" #1 50%j'
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "slurm", f"run.dir='runs/{name}'", "--time", "5", "--dry-run"]) == 0
    (tmp_path / "job").write_text(capsys.readouterr().out)
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\n")
    environment = os.environ | {"SLURM_CONF": f"{tmp_path}/slurm.conf", "PATH": PATH}
    done = subprocess.run(
        ["sbatch", "-v", "job"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    said = dict(re.findall(r"^sbatch: ([a-z-]+) +: (.*)$", done.stderr, re.MULTILINE))
    assert said["job-name"] == name, done.stderr
    assert said["output"].endswith(f"runs/{name.replace('%', '%%')}-%j.log")
