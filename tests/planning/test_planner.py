"""The plan: bytes counted on fake tensors against bytes that were really held, shares by hand, and what is advised."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_vpt.cli.main import main
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.launch_env import ALONE
from dist_vpt.errors import RunFailed, UserError
from dist_vpt.files import shipped_folder
from dist_vpt.planning import choices as choices_module
from dist_vpt.planning import planner as plan_module
from dist_vpt.planning.choices import POLICIES, as_counted, choices, fits, micro_batch, policies, recommendation
from dist_vpt.planning.footprint import LIVE_WEIGHTS, REDUCE_BUCKET, MemoryEstimate, footprint, pinned_bytes
from dist_vpt.planning.machines import CONTEXT, FRAGMENTATION, GIB, MIB, Machines, parse_memory
from dist_vpt.planning.measure import RESULTS, known_speeds
from dist_vpt.planning.planner import check_memory
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from tests.forks import Forks, command
from tests.running import ROOT, train, words

# Methods, policies, kernels, optimizers and precisions that differ; one process, some with accumulated micro-batches.
RECIPES: dict[str, list[str]] = {
    "vpt": ["method.prompts=20"],
    "vpt checkpointed": [
        "method.prompts=20",
        "runtime.activation_checkpointing=block",
        "optim.name=adamw",
        "optim.lr=0.01",
    ],
    "vpt accumulated": ["method.prompts=20", "train.grad_accum_steps=2", "runtime.attention=eager"],
    "full": ["method.name=full", "optim.name=adamw", "optim.lr=1e-4"],
    "full in bf16": ["method.name=full", "runtime.precision=bf16", "optim.lr=1e-4"],
    "full in bf16, budget": [
        "method.name=full",
        "runtime.precision=bf16",
        "runtime.activation_checkpointing=budget-0.5",
    ],
    "vpt offloaded": ["method.prompts=20", "runtime.offload=true"],
    "vqt": ["method.name=vqt", "method.queries=4", "optim.name=adam", "optim.lr=0.01"],
    "linear": ["method.name=linear"],
}
if find_spec("torchao") is not None:
    RECIPES["int8"] = ["method.prompts=20", "runtime.quantize=int8", "runtime.precision=bf16"]
# Backward on fake tensors starts threads of autograd's, after which this process could not fork: so in another one.
# What is offloaded waits in NumPy's arrays there, which torch's allocator does not see.
COUNT = """
import json, sys
from dataclasses import asdict
from dist_vpt.planning import measure
from dist_vpt.planning.footprint import footprint, pinned_bytes
from dist_vpt.runtime.offload import apply_offload
from dist_vpt.recipe.loading import load_recipe
import torch

counted, waiting, whole = {}, [], measure.make_training

def put_away(tensor):
    array = tensor.detach().numpy().copy(order="K")
    waiting.append(array.nbytes)
    return lambda: torch.from_numpy(array).clone()

def make_training(recipe, preprocessing, classes):
    kept = recipe.runtime.model_copy(update={"offload": False})
    training = whole(recipe.model_copy(update={"runtime": kept}), preprocessing, classes)
    if recipe.runtime.offload:
        apply_offload(training.method.backbone, put_away)
    return training

measure.make_training = make_training
for name, options in json.loads(sys.argv[1]).items():
    recipe = load_recipe([], options)
    counted[name] = [asdict(footprint(recipe, 10)), measure.measured_bytes(recipe, 10), sum(waiting) // 2]  # two steps
    waiting.clear()
print(json.dumps(counted))
"""


def recipe(*overrides: str) -> Recipe:
    return load_recipe([], words(Path("nowhere"), "data.image_size=24", "train.batch_size=16", *overrides))


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[MemoryEstimate, int, int]]:
    asked = {
        name: words(Path("nowhere"), "data.image_size=24", "train.batch_size=16", *o) for name, o in RECIPES.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", COUNT, json.dumps(asked)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (MemoryEstimate(**of), held, waiting) for name, (of, held, waiting) in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_counted_bytes_are_those_that_the_engine_s_step_holds(name: str, counted: Any) -> None:
    """float32: but for what kernels take for themselves, which in bf16 is some."""
    found, held, waiting = counted[name]
    share = found.on("ddp", 1)
    assert share.held + share.working == pytest.approx(held, rel=0.05 if "bf16" in name else 0.01)
    assert share.host == waiting
    assert (waiting > 0) == (name == "vpt offloaded")


@pytest.mark.slow
def test_what_stays_between_steps_is_known_by_hand(counted: Any) -> None:
    trained = (6 * 20 * 128 + 128 * 10 + 10) * 4  # prompts of six blocks, head
    vpt, adamw = counted["vpt"][0], counted["vpt checkpointed"][0]
    assert vpt.trained == vpt.gradients == vpt.optimizer == trained  # sgd: a momentum
    assert adamw.optimizer == pytest.approx(2 * trained, abs=64)  # and a step count
    assert vpt.parameters == vpt.trained_parameters + (vpt.frozen - 6 * 4) // 4  # mean and std: three numbers each
    full, half = counted["full"][0], counted["full in bf16"][0]
    assert full.trained == half.trained  # its weights stay float32
    assert full.frozen == 6 * 4


@pytest.mark.slow
def test_policies_hold_less(counted: Any) -> None:
    assert counted["vpt checkpointed"][0].working < counted["vpt"][0].working / 2
    assert counted["vqt"][0].working < counted["vpt"][0].working / 2
    assert counted["vpt offloaded"][0].working < counted["vpt checkpointed"][0].working
    assert counted["vpt"][0].scoring == counted["vpt checkpointed"][0].scoring  # nothing is kept there anyway


FOOTPRINT = MemoryEstimate(
    frozen=1000, trained=400, gradients=400, optimizer=800, working=5000, height=5100, scoring=700,
    parameters=350, trained_parameters=100,
)  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "processes", "held", "beyond"),
    [
        ("ddp", 1, 1400 + 800, 5100),
        ("ddp", 4, 1400 + 800 + 400, 5000),
        ("zero1", 4, 1400 + (800 + 400) // 4 + 400, 5000 + 400),  # the bucket: no more than all gradients
        ("zero2", 4, 1400 + (800 + 400) // 4 + 100, 5000 + 400),
        ("zero3", 4, 350 + (800 + 400) // 4 + 100, 5000 + 400 + 1400),  # all weights are fewer than may be gathered
        ("zero3_offload", 4, 100, 5000 + 400 + 1400),
    ],
)
def test_shares_by_hand(strategy: str, processes: int, held: int, beyond: int) -> None:
    share = FOOTPRINT.on(strategy, processes)
    assert (share.held, share.peak) == (held, held + beyond)


def test_zero3_never_gathers_more_than_its_file_says() -> None:
    numbers = 10 * LIVE_WEIGHTS
    large = MemoryEstimate(2 * numbers, 0, 0, 0, 0, 0, 0, parameters=numbers, trained_parameters=0)
    assert large.on("zero3", 2).peak == numbers + 2 * LIVE_WEIGHTS


def test_deepspeeds_optimizers_step_on_a_whole_part_at_once() -> None:
    """With temporaries as large as the part; activations are gone by then."""
    small = replace(FOOTPRINT, working=50, temporaries=400)
    assert small.on("zero1", 4).working == 100 + 400  # and the bucket
    assert small.on("zero3", 2).working == 200 + 400 + 1400
    assert small.on("ddp", 4).working == 50
    assert replace(FOOTPRINT, temporaries=400).on("zero2", 4).working == 5000 + 400


def test_the_sizes_are_those_of_the_files() -> None:
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        zero = json.loads((ROOT / "launch" / "accelerate" / f"{name}.json").read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == REDUCE_BUCKET
        if zero["stage"] == 3:
            assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == LIVE_WEIGHTS


@pytest.fixture
def by_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 1 GiB and 0.1 GiB an image, 0.02 where blocks are checkpointed; scoring takes 0.01 GiB an image."""

    def footprint(recipe: Recipe, classes: int, images: int, *, gpus: bool) -> MemoryEstimate:
        each = {"none": 0.1, "block": 0.02}.get(recipe.runtime.activation_checkpointing, 0.1)
        step, scoring = int((1 + each * images) * GIB), int(0.01 * recipe.train.eval_batch_size * GIB)
        return MemoryEstimate(GIB, 0, 0, 0, step, step, scoring, parameters=1, trained_parameters=0)

    monkeypatch.setattr(choices_module, "footprint", footprint)
    monkeypatch.setattr(plan_module, "footprint", footprint)


def memory_for(gib: float) -> int:
    """Memory of a device in which so many GiB fit."""
    return int(gib * GIB * (1 + FRAGMENTATION) + CONTEXT) + 1


@pytest.mark.usefixtures("by_the_image")
@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        (3.7, "the recipe as it is"),  # 1 + 1 + 16 * 0.1
        (3.5, "runtime.activation_checkpointing=block"),
        (2.2, "train.grad_accum_steps=2 "),  # 8 images take 0.16
        (2.05, "train.grad_accum_steps=8 "),
        (1.0, None),
    ],
)
def test_what_is_recommended(gib: float, advice: str | None) -> None:
    some, machines = recipe("train.eval_batch_size=50"), Machines(memory_for(gib))
    found = [c for c in choices(some, 10, machines) if c.policy in ("none", "block")]
    if advice is None:
        with pytest.raises(RunFailed, match=r"nothing fits: 1.7 GiB each \(614 MiB for the GPU's .* take 1.00 GiB in"):
            recommendation(some, 10, found, machines)
        return
    assert advice.strip() in recommendation(some, 10, found, machines)


@pytest.mark.usefixtures("by_the_image")
def test_the_largest_batch_fits_and_one_more_image_does_not() -> None:
    some = recipe()
    for choice in choices(some, 10, Machines(memory_for(5))):
        each = 0.02 if choice.policy == "block" else 0.1
        if choice.policy in ("none", "block"):
            assert 2 + each * choice.largest <= 5 < 2 + each * (choice.largest + 1) + 1e-6


@pytest.mark.usefixtures("by_the_image")
def test_scoring_that_does_not_fit_is_made_smaller() -> None:
    some, machines = recipe("train.eval_batch_size=500"), Machines(memory_for(4))
    assert "train.eval_batch_size=300" in recommendation(some, 10, choices(some, 10, machines), machines)


def test_a_policy_that_is_not_for_the_backbone_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every-2 for a single block; the recipe's own is refused with the reason."""

    def footprint(recipe: Recipe, classes: int, images: int, *, gpus: bool) -> MemoryEstimate:
        if recipe.runtime.activation_checkpointing == "every-2":
            raise UserError("a single block")
        return MemoryEstimate(GIB, 0, 0, 0, images * MIB, images * MIB, recipe.train.eval_batch_size, 1, 0)

    monkeypatch.setattr(choices_module, "footprint", footprint)
    monkeypatch.setattr(plan_module, "footprint", footprint)
    rows = {choice.policy for choice in choices(recipe(), 10, Machines(memory_for(4)))}
    assert rows == {"none", "mlp", "budget-0.5", "block", "none + offload", "block + offload"}
    with pytest.raises(UserError, match="a single block"):
        choices(recipe("runtime.activation_checkpointing=every-2"), 10, Machines(memory_for(4)))


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_the_largest_batch_by_footprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the optimizer's copies of the weights are higher than the activations of few images, too."""
    monkeypatch.setattr(choices_module, "POLICIES", (("none", False),))
    file, machines, memory = tmp_path / "counted.json", Machines(100 * MIB, gpus=False), 2**20
    full = [recipe("method.name=full", "train.eval_batch_size=2", f"train.batch_size={n}") for n in (2, 32)]
    partial = recipe("method.name=partial", "train.eval_batch_size=2", "train.batch_size=2")

    def peak(of: Recipe, images: int) -> int:
        return footprint(of, 10, images).on("ddp", 1).peak

    def count(rank: int) -> None:
        found: dict[str, Any] = {"largest": [choices(each, 10, machines)[0].largest for each in (*full, partial)]}
        found["peaks"] = [peak(full[0], found["largest"][0] + more) for more in (0, 1)]
        tight = Machines(int((peak(full[0], 1) - memory) * (1 + FRAGMENTATION)), gpus=False)
        found["tight"] = [(c.largest, c.fits) for c in choices(full[1], 10, tight)]
        half = Machines(int(peak(full[1], 16) * (1 + FRAGMENTATION)) + 1, gpus=False)
        overrides = recommendation(full[1], 10, choices(full[1], 10, half), half).removeprefix("recommended: ").split()
        changed = recipe("method.name=full", "train.eval_batch_size=2", "train.batch_size=32", *overrides)
        found["half"] = [overrides, fits(changed, 10, "ddp", half)]
        file.write_text(json.dumps(found))

    forks = Forks(1, count, tmp_path / "output.txt")
    assert forks.finish() == [0], forks.output
    found = json.loads(file.read_text())
    assert found["largest"][0] == found["largest"][1]  # whatever the recipe's own batch
    assert found["largest"][2] > found["largest"][0]
    assert found["peaks"][0] <= machines.budget < found["peaks"][1]
    assert found["tight"] == [[0, False]]  # no batch is small enough for the weights' own copies
    # Two micro-batches of 16 hold gradients between them, which one of 16 alone does not.
    assert found["half"][1]
    assert found["half"][0] != ["train.grad_accum_steps=2"]


@pytest.mark.usefixtures("by_the_image")
def test_a_run_that_cannot_fit_is_refused_or_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(
        device=torch.device("cuda"), num_processes=1, state=SimpleNamespace(deepspeed_plugin=None), launch=ALONE
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(3.5 * (1 + FRAGMENTATION) * GIB), 0))
    with pytest.raises(
        UserError, match=r"estimated to hold 3.6 GiB .* recommended: runtime.activation_checkpointing=block"
    ):
        check_memory(recipe("train.eval_batch_size=50"), gpu, 10)
    assert "recommended" in check_memory(recipe("train.eval_batch_size=50", "runtime.memory_check=warn"), gpu, 10)
    # A compiler's step holds less than is counted.
    assert "recommended" in check_memory(recipe("train.eval_batch_size=50", "runtime.compile=true"), gpu, 10)
    assert check_memory(recipe("runtime.memory_check=ignore"), gpu, 10) == ""
    assert check_memory(recipe("train.batch_size=4", "train.eval_batch_size=50"), gpu, 10) == ""
    assert check_memory(recipe("train.batch_size=200"), RankAccelerator(cpu=True), 10) == ""  # of GPUs alone


@pytest.mark.usefixtures("by_the_image")
@pytest.mark.parametrize(
    ("options", "strategies"),
    [
        ([], {"ddp", "zero1", "zero2", "zero3", "zero3_offload"}),
        (["method.name=linear"], {"ddp", "zero1", "zero2", "zero3", "zero3_offload"}),
        (["method.name=vqt"], {"ddp", "zero1", "zero2"}),
        (["runtime.compile=true"], {"ddp", "zero1", "zero2"}),
        (["runtime.precision=fp16"], {"ddp"}),
    ],
    ids=lambda value: " ".join(sorted(value)),  # a set has another order in each process
)
def test_strategies_that_train_would_refuse_are_not_offered(options: list[str], strategies: set[str]) -> None:
    found = choices(recipe(*options), 10, Machines(memory_for(9), devices=2))
    assert {choice.strategy for choice in found} == strategies
    assert not [c for c in found if c.strategy.startswith("zero3") and c.policy.startswith("budget")]


@pytest.mark.usefixtures("by_the_image")
@pytest.mark.parametrize(
    ("machines", "start"),
    [
        (Machines(memory_for(9)), "recommended: the recipe as it is"),
        (
            Machines(memory_for(9), 4),
            f"recommended: the recipe as it is; start with {shipped_folder('launch')}/local.sh ddp 4",
        ),
        (
            Machines(memory_for(9), 4, 2),
            "recommended: the recipe as it is; start with dist-vpt launch slurm ... --nodes 2 --gpus-per-node 4 "
            "--strategy ddp",
        ),
    ],
)
def test_how_to_start(machines: Machines, start: str) -> None:
    some = recipe("train.eval_batch_size=50")
    assert recommendation(some, 10, choices(some, 10, machines), machines) == start


@pytest.mark.parametrize("own", ["none", "budget-0.25", "every-3"])
def test_the_recipe_s_own_policy_is_planned(own: str) -> None:
    found = list(policies(recipe(f"runtime.activation_checkpointing={own}"), gpus=True))
    (as_it_is,) = [name for name, overrides, _ in found if not overrides]
    assert as_it_is == own
    assert len({name for name, _, _ in found}) == len(found) == len(POLICIES) + (own != "none")
    assert {one.runtime.activation_checkpointing for _, _, one in found} >= {policy for policy, _ in POLICIES}


def test_offload_is_planned_for_gpus_alone() -> None:
    some = recipe("runtime.offload=true")
    found = {name: overrides for name, overrides, _ in policies(some, gpus=True)}
    assert found["none + offload"] == ()
    assert found["block"] == ("runtime.activation_checkpointing=block", "runtime.offload=false")
    found = {name: overrides for name, overrides, _ in policies(some, gpus=False)}
    assert found["none"] == ("runtime.offload=false",)
    assert not any("offload" in name for name in found)


def test_policies_come_in_the_order_of_their_measured_times() -> None:
    (file,) = RESULTS.glob("policies-*.json")
    times = json.loads(file.read_text())["step_ms"]
    measured = [times[policy] for policy, offload in POLICIES if not offload]
    assert measured == sorted(measured)


@pytest.mark.parametrize("kernel", ["auto", "sdpa_cudnn", "flash", "eager"])
def test_a_gpu_s_kernel_is_counted_where_there_is_none(kernel: str) -> None:
    some = recipe(f"runtime.attention={kernel}", "runtime.precision=bf16")
    assert as_counted(some, gpus=False) == some
    assert as_counted(some, gpus=True).runtime.attention == ("eager" if kernel == "eager" else "sdpa")


@pytest.mark.parametrize(
    ("options", "device", "files"),
    [
        (["method.prompts=50"], "cpu", 2),  # with and without checkpointing
        (["method.prompts=50", "backbone.name=sup_b16_in21k"], "cpu", 2),
        (["method.prompts=50", "backbone.name=vit_base_patch16_224.augreg_in21k"], "cpu", 2),
        (["method.prompts=50"], "cuda", 0),
        (["method.prompts=10"], "cpu", 0),
        (["method.prompts=50", "method.deep=false"], "cpu", 0),
        (["method.prompts=50", "backbone.name=vit_large_patch16_224"], "cpu", 0),
    ],
)
def test_speeds_of_the_same_method_on_such_a_device(options: list[str], device: str, files: int) -> None:
    some = load_recipe([], ["backbone.name=vit_base_patch16_224", "runtime.precision=bf16", *options])
    assert len(list(known_speeds(some, device))) == files


@pytest.mark.parametrize("where", ["dist_vpt.experiments.run._set_up", "dist_vpt.experiments.run.fit"])
def test_an_out_of_memory_error_ends_with_advice(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(where, fails)
    monkeypatch.setattr(plan_module, "suggestion", lambda *_: "recommended: less")
    with pytest.raises(RunFailed, match="out of memory on cpu; recommended: less"):
        train(tmp_path / "run", "runtime.device=cpu")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80 GB", 80 * 10**9), ("512mib", 2**29), ("0.5", GIB // 2)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "24 bytes", "0GiB", "-1"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--gpu-memory .*: must be a size such as 24GiB"):
        parse_memory(text)


def test_a_batch_that_devices_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"train.batch_size = 16: must be a multiple of 3"):
        micro_batch(recipe().train, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_the_command(tmp_path: Path) -> None:
    def planned(*more: str) -> Forks:
        return command(["plan", *words(tmp_path / "run", "method.name=linear"), *more], tmp_path / "output.txt")

    options = (
        "--gpus",
        "2",
        "--gpu-memory",
        "4GiB",
        "--measure",
        "train.grad_accum_steps=2",
        "runtime.attention=sdpa_cudnn",
    )
    forks = planned(*options[:-1])
    assert forks.finish() == [0], forks.output
    for expected in (
        "micro-batches of 50 images on 2 devices with 4.0 GiB each",
        "zero3_offload",
        "measured: ",
        "recommended: ",
    ):
        assert expected in " ".join(forks.output.split())
    assert [file.name for file in tmp_path.iterdir()] == ["output.txt"]
    assert planned("--gpu-memory", "4GiB", options[-1]).finish() == [0]  # a GPU's kernel, which this machine lacks
    assert planned("--gpu-memory", "600MiB").finish() == [3]
    assert "error: nothing fits" in forks.output
    assert planned("--gpus", "0").finish() == [2]


def test_a_plan_needs_no_data_of_a_known_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(plan_module, "plan", lambda recipe, *more, **named: seen.append((recipe.data.task, *more)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train" / "cats").mkdir(parents=True)  # classes of nobody's task
    assert main(["plan", "data.task=dtd", "--gpus", "4", "--nodes", "2", "--gpu-memory", "4GiB"]) == 0
    assert seen == [("dtd", 4, 2, 4 * GIB)]
    assert main(["plan", "data.task=mine", "data.format=image_folder"]) == 2
    assert "data.root is missing: format 'image_folder' needs the folder of the dataset; set root" in (
        capsys.readouterr().err
    )
    assert main(["plan", "data.task=dtd", "optim.lrr=1"]) == 2
    assert "2 mistakes" in capsys.readouterr().err
    assert len(seen) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_s_optimizer_steps_on_all_tensors_at_once(optimizer: str, precision: str) -> None:
    """All gradients and weights before the step; in fp16, where no optimizer is fused, beside them roots of all second
    moments or decayed gradients.
    """
    options = ("method.name=full", f"optim.name={optimizer}", "optim.weight_decay=0.1", "train.eval_batch_size=1")
    of = recipe(*options, "train.batch_size=1", f"runtime.precision={precision}")
    on_cpu, on_gpu = footprint(of, 10), footprint(of, 10, gpus=True)
    assert on_gpu.trained == on_cpu.trained
    assert on_gpu.optimizer == on_cpu.optimizer
    assert on_cpu.height < 2.5 * on_cpu.trained
    if precision == "fp16":
        assert on_gpu.height == pytest.approx(3 * on_cpu.trained, rel=0.01)  # but for biases, a group of their own
    else:
        assert on_gpu.height < 2.5 * on_gpu.trained


@pytest.mark.parametrize("labels", ["single", "multiple"])
def test_a_batch_is_copied_to_a_gpu_alone(labels: str) -> None:
    """A CPU takes images and labels as loaders give them, but for augmented ones, which are made there."""
    of = recipe("method.name=linear", "train.eval_batch_size=40").changed("data", labels=labels)
    on_cpu, on_gpu = footprint(of, 10), footprint(of, 10, gpus=True)
    batch = 3 * 24 * 24 + (8 if labels == "single" else 10 * 4)  # bytes of an image
    assert on_gpu.scoring - on_cpu.scoring == 40 * batch
    assert on_gpu.height - on_cpu.height == 16 * batch


def test_pinned_memory_comes_in_powers_of_two() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 2, 3, 4096, 4097)] == [0, 1, 2, 4, 4096, 8192]
    of = recipe("method.prompts=20", "runtime.offload=true")
    exact, pinned = footprint(of, 10).host, footprint(of, 10, gpus=True).host
    assert exact < pinned < 2 * exact
