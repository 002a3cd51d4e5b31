"""One process and two, DDP and every ZeRO stage: equal losses, whole adapters, resumable."""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training.accelerator import make_accelerator, prepare
from dist_vpt.training.components import build_components
from tests.backbones.published import FILES
from tests.forks import Forks, command, launched
from tests.running import ROOT, finish, metrics, start, step_losses, train, wait_for, words, workers_of

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
# As the README says; the other files differ by a name alone. For launch/local.sh: the signal below, and test_wheel.py.
LAUNCHED = "zero2"
STRATEGIES = ("ddp", LAUNCHED, "zero3", "zero0", "zero1", "zero3_offload")
SPANNING = ("train.epochs=2", "optim.clip_norm=1", "train.class_weights=inv", "method.prompts=3")  # processes
# 100 images in batches of 12: the ninth is smaller and shared unevenly.
UNEVEN = (*SPANNING, "train.batch_size=12", "optim.scale_lr=false", "optim.lr=0.02")
# 1,000 images: long enough for a signal to find the run under way.
LONG = (*SPANNING, "train.batch_size=60", "optim.name=adamw", "optim.lr=0.01", "train.epochs=3")

INSIDE = {
    "partial": ("method.name=partial", "method.blocks=1"),
    "bias": ("method.name=bias",),
    "cls": ("method.name=cls",),
    "lora": ("method.name=lora", "method.targets=[q,v,fc1]", "method.rank=2"),
    "houlsby": ("method.name=adapter", "method.style=houlsby", "method.bottleneck=4"),
    "adaptformer": ("method.name=adaptformer", "method.bottleneck=4"),
    "ssf": ("method.name=ssf",),
    "pad": ("method.name=vpt", "method.location=pad", "method.deep=false", "method.prompts=8"),
    "below": ("method.name=vpt", "method.location=below", "method.deep=false", "method.prompts=2"),
    "side": ("method.name=side", "method.channels=8"),
    "combo": ("method.name=combo", "method.width=16", "method.depth=1"),
    "ladder": ("method.name=ladder",),
    "vpt+": ("method.name=vpt", "method.extra_trainable=[bias,cls]", "method.init=tokens", "method.prompts=2"),
}


def forked(strategy: str, folder: Path, *overrides: str) -> Forks:
    """A run on two processes without a launcher."""
    file = ROOT / "launch" / "accelerate" / f"{strategy}.json"
    if strategy == "zero0":  # no file in launch/: DeepSpeed without sharding is for comparison alone
        file = folder.parent / "zero0.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    if strategy == "zero3_all":  # our file keeps small tensors whole; here all are sharded, as most of a large model's
        config = json.loads(file.with_name("zero3.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        file = folder.parent / "zero3_all.json"
        file.write_text(json.dumps(config))
    output = folder.parent / f"{folder.name}.txt"
    return command(["train", *words(folder, *overrides)], output, "ddp" if strategy == "ddp" else str(file))


def test_accelerate_s_files_differ_by_a_name() -> None:
    """So that what is launched below stands for all."""
    launched = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    assert launched["deepspeed_config"].pop("deepspeed_config_file") == "ds_config.json"
    for strategy in ("zero1", "zero2", "zero3", "zero3_offload"):
        name = f"launch/accelerate/{strategy}.json"
        config = yaml.safe_load((ROOT / name).with_suffix(".yaml").read_text())
        assert config["deepspeed_config"].pop("deepspeed_config_file") == name
        assert (ROOT / name).is_file()
        assert config == launched


@pytest.fixture(scope="module")
def tiny(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Overrides: the data, and a ViT of two blocks, 16 wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZOO, "tiny", FILES["in1k"].row)
        file = FILES["in1k"].save(tmp_path_factory.mktemp("backbone"))
        yield (*data, "backbone.name=tiny", f"backbone.weights={file}", "data.image_size=32")


@pytest.fixture(scope="module")
def alone(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(folder, *data, *UNEVEN)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(strategy: str, data: tuple[str, ...], alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = (*data, *UNEVEN, *(("train.grad_accum_steps=3",) if strategy in ("ddp", "zero2", "zero3") else ()))
    if strategy == LAUNCHED:
        process = start(strategy, folder, *options)
        output = finish(process)
        assert process.returncode == 0, output[-3000:]
    else:
        forks = forked(strategy, folder, *options)
        assert forks.finish() == [0, 0], forks.output[-3000:]
    one, two = step_losses(alone), step_losses(folder)
    assert len(one) == len(two) == 18
    assert two == pytest.approx(one, abs=1e-4)
    for a, b in zip(metrics(alone), metrics(folder), strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    result = json.loads((folder / "result.json").read_text())
    assert (result["strategy"], result["processes"]) == (strategy.removesuffix("_offload"), 2)
    assert result["parameters"] == json.loads((alone / "result.json").read_text())["parameters"]
    ours, theirs = (read_adapters(run / "adapters.safetensors")[0] for run in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-4), name
    assert evaluate_run(str(folder), "test", "last")["top1"] == pytest.approx(result["last"]["test"]["top1"])
    saved = sum(p.stat().st_size for p in (folder / "state").rglob("*") if p.is_file())
    assert saved < 2_000_000  # two states without the frozen 1.2 million weights


def test_ddp_sends_no_buffers_and_starts_without_a_warning(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        recipe = load_recipe([], words(tmp_path / "run"))
        launch = LaunchEnv.current()
        method, accelerator = build_components(recipe, launch).method, make_accelerator(recipe, launch)
        assert [*method.buffers()]
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            model, _ = prepare(recipe.optim, accelerator, method)
        return len(model.modules_buffers) + model.will_sync_module_buffers()

    forks = launched(work, tmp_path / "output.txt", "ddp")
    assert forks.finish() == [0, 0], forks.output[-3000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, *LONG)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_stopped_by_a_signal_to_one_process_and_resumed(strategy: str, whole: Path, tmp_path: Path) -> None:
    """State, optimiser and position come back; DDP's state goes on on one process."""
    folder = tmp_path / "run"
    log = folder / "train.log"
    if strategy == "ddp":  # below a launcher
        process = start(strategy, folder, *LONG)
        wait_for(lambda: (log.exists() and "step 3/" in log.read_text()) or process.poll() is not None)
        workers_of(process)[-1].send_signal(signal.SIGUSR1)
        output = finish(process)
        assert process.returncode != 0
    else:
        forks = forked(strategy, folder, *LONG)
        wait_for(lambda: (log.exists() and "step 3/" in log.read_text()) or not forks.running)
        forks.send(signal.SIGUSR1, rank=1)
        assert forks.finish() == [75, 75], forks.output[-3000:]
        output = forks.output
    assert output.count("stopped at step") == 1, output[-3000:]
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    if strategy == "ddp":
        train(folder, *LONG, "run.resume=auto")
    else:
        forks = forked(strategy, folder, *LONG, "run.resume=auto")
        assert forks.finish() == [0, 0], forks.output[-3000:]
        assert "resumed from" in forks.output
    assert len(metrics(folder)) == len(metrics(whole))
    for a, b in zip(metrics(whole), metrics(folder), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)


def test_zero3_holds_its_share_of_the_frozen_weights_between_steps(data: tuple[str, ...], tmp_path: Path) -> None:
    forks = forked("zero3_all", tmp_path / "run", *data)
    assert forks.finish() == [0, 0], forks.output[-3000:]
    shared = json.loads((tmp_path / "run" / "result.json").read_text())["frozen_weights_mib"]
    train(tmp_path / "alone", *data)
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())["frozen_weights_mib"]
    assert alone["held"] == alone["whole"] == shared["whole"]
    assert 0.49 * shared["whole"] < shared["held"] < 0.6 * shared["whole"]


@pytest.mark.parametrize("method", INSIDE)
def test_two_processes_equal_one_for_methods_inside(method: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Two steps, computed again in backward; then the adapters of two processes score on one."""
    stage = "zero2" if method in ("combo", "ladder") else "zero3"  # whose layers ZeRO-3 does not gather
    assert_equal_on_two(("ddp", stage), tmp_path, *tiny, *INSIDE[method])


ELSEWHERE = [("swin", ("ddp", "zero3_all")), ("dinov3", ("zero3_all",))]


@pytest.mark.parametrize(("backbone", "strategies"), ELSEWHERE, ids=lambda value: value if value in FILES else "")
def test_two_processes_equal_one_on_other_backbones(
    backbone: str, strategies: tuple[str, ...], data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tiny models of published files: shifted windows, merging, rotary positions."""
    monkeypatch.setitem(ZOO, "tiny", FILES[backbone].row)
    file = FILES[backbone].save(tmp_path)
    options = ("backbone.name=tiny", f"backbone.weights={file}", "data.image_size=32", "method.prompts=2")
    assert_equal_on_two(strategies, tmp_path, *data, *options)


def assert_equal_on_two(strategies: tuple[str, ...], tmp_path: Path, *settings: str) -> None:
    # sgd: Adam would make steps of gradients that are noise
    options = (*settings, "train.batch_size=50", "optim.scale_lr=false", "optim.lr=0.2")
    result = train(tmp_path / "alone", *options)
    assert evaluate_run(str(tmp_path / "alone"), "test", "last") == pytest.approx(result["last"]["test"])
    theirs, _ = read_adapters(tmp_path / "alone" / "adapters.safetensors")
    for strategy in strategies:
        folder = tmp_path / strategy
        reader = any(f"method.name={name}" in settings for name in ("side", "combo", "ladder"))
        more = () if reader else ("runtime.activation_checkpointing=block",)  # readers: none
        forks = forked(strategy, folder, *options, *more)
        assert forks.finish() == [0, 0], forks.output[-3000:]
        assert step_losses(folder) == pytest.approx(step_losses(tmp_path / "alone"), abs=1e-4), strategy
        ours, _ = read_adapters(folder / "adapters.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.allclose(tensor, theirs[name], atol=1e-4), (strategy, name)
        scored = evaluate_run(str(folder), "test", "last")
        assert scored["loss"] == pytest.approx(result["last"]["test"]["loss"], abs=1e-3), strategy


TRAINED = {
    "vpt": ("method.prompts=3", "optim.scale_lr=false", "optim.lr=0.08"),  # frozen blocks
    "full": ("method.name=full", "optim.name=adamw", "optim.scale_lr=false", "optim.lr=8e-4"),
}
MIXED = [("zero3_all", policy, method) for policy in ("mlp", "block") for method in TRAINED]
MIXED += [("zero3_all", "every-2", "vpt"), ("ddp", "budget-0.5", "vpt"), ("zero2", "budget-0.5", "full")]


@pytest.fixture(scope="module")
def unchecked(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process without checkpointing, by method."""
    folder, losses = tmp_path_factory.mktemp("unchecked"), {}
    for method, options in TRAINED.items():
        train(folder / method, *tiny, *options, "optim.clip_norm=1")
        losses[method] = step_losses(folder / method)
    return losses


@pytest.mark.parametrize(("strategy", "policy", "method"), MIXED)
def test_checkpointing_on_two_processes(  # noqa: PLR0917 (fixtures)
    strategy: str,
    policy: str,
    method: str,
    tiny: tuple[str, ...],
    unchecked: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    """Under ZeRO-3 sharded weights are gathered again in backward, the frozen ones and those that are trained."""
    options = (*tiny, *TRAINED[method], "optim.clip_norm=1", f"runtime.activation_checkpointing={policy}")
    forks = forked(strategy, tmp_path / "run", *options)
    assert forks.finish() == [0, 0], forks.output[-3000:]
    assert step_losses(tmp_path / "run") == pytest.approx(unchecked[method], abs=1e-4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "runtime.activation_checkpointing=budget-0.5",
            "runtime.activation_checkpointing = budget-0.5: ZeRO-3 gathers weights at other moments",
        ),
        ("method.name=vqt", "method.name = vqt: reads the weights inside the blocks, which ZeRO-3 gathers only while"),
    ],
)
def test_what_zero3_cannot_do(option: str, message: str, tmp_path: Path) -> None:
    forks = forked("zero3", tmp_path / "run", option)
    assert forks.finish() == [2, 2]
    assert forks.output.count(message) == 1, forks.output[-3000:]


def test_a_batch_that_the_processes_do_not_divide(tmp_path: Path) -> None:
    forks = forked("ddp", tmp_path / "run", "train.batch_size=61")
    assert forks.finish() == [2, 2]
    assert "batch_size 61: must be a multiple of 2" in forks.output
    assert not (tmp_path / "run" / "state").exists()


def test_an_unreadable_image_on_one_process_is_reported_once_and_by_name(tmp_path: Path) -> None:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    lines = []
    for i in range(40):
        Image.new("RGB", (8, 8), (6 * i, 0, 0)).save(images / f"{i}.png")
        lines.append(f"images/{i}.png {i % 2}\n")
    for name in ("train800", "val200", "train800val200", "test"):
        (tmp_path / "data" / f"{name}.txt").write_text("".join(lines))
    (images / "7.png").write_bytes((images / "7.png").read_bytes()[:40])
    options = ("data.task=mine", "data.format=vtab_folder", f"data.root={tmp_path / 'data'}", "train.batch_size=4")
    forks = forked("ddp", tmp_path / "run", *options)
    assert forks.finish() == [2, 2]
    assert forks.output.count("error: ") == 1, forks.output[-3000:]
    assert "7.png" in json.loads((tmp_path / "run" / "run.json").read_text())["reason"]
    forks = forked("ddp", tmp_path / "other", *options, "data.on_decode_error=skip")
    assert forks.finish() == [0, 0], forks.output[-3000:]
    skipped = json.loads((tmp_path / "other" / "result.json").read_text())["skipped_images"]
    assert [Path(name).name for name in skipped] == ["7.png"]


def test_the_terminal_starts_with_the_run_s_own_line(tmp_path: Path) -> None:
    """Nothing of the launcher, torch or DeepSpeed stands before it."""
    settings = ("data.task=digits", "method.name=linear", "train.epochs=1", "train.batch_size=500")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [ROOT / "launch" / "local.sh", "zero2", "2", *words(tmp_path / "run", *settings)],
        env=environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("demo + linear: "), done.stdout
