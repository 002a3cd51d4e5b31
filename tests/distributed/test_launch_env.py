"""What a process learns from its launcher's variables, and that it learns it in one module."""

import ast
import os

import pytest
import torch

from dist_vpt.distributed.launch_env import PROCESSES_PER_GPU, LaunchEnv, SlurmEnv, detach_from_launcher
from dist_vpt.errors import UserError
from tests.running import ROOT

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "SLURMD_", "ACCELERATE_")
LAUNCHED = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "0.5",
}  # fmt: skip


ACCELERATE = {"mixed_precision": "bf16", "grad_accum_steps": "4", "gradient_clipping": "0.5"}


def reads(tree: ast.AST) -> list[int]:
    """Lines where the value or the presence of a launcher's variable is looked up."""
    found: list[tuple[ast.expr, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            found.append((node.slice, node.lineno))
        elif isinstance(node, ast.Call):
            found += [(argument, node.lineno) for argument in node.args]
        elif isinstance(node, ast.Compare):
            found += [(side, node.lineno) for side in (node.left, *node.comparators)]
    return [
        line
        for name, line in found
        if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value.startswith(NAMES)
    ]


def test_one_module_reads_the_variables_of_launchers() -> None:
    paths = sorted((ROOT / "dist_vpt").rglob("*.py"))
    readers = {path.name: lines for path in paths if (lines := reads(ast.parse(path.read_text())))}
    assert list(readers) == ["launch_env.py"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("os.environ['SLURM_JOB_ID']", True),
        ("environ.get('RANK', '0')", True),
        ("'LOCAL_RANK' in os.environ", True),
        ("os.environ['ACCELERATE_USE_CPU'] = 'true'", False),
        ("{'LOCAL_WORLD_SIZE': '2'}", False),
    ],
)
def test_a_read_is_found(line: str, found: bool) -> None:
    assert bool(reads(ast.parse(line))) == found


def test_variables_of_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LaunchEnv.parse({}) == LaunchEnv()
    expected = LaunchEnv(3, 4, 1, 2, "n1", "29500", launched=True, deepspeed=True, **ACCELERATE)
    assert LaunchEnv.parse(LAUNCHED) == expected
    slurm = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n2", "SLURM_NODEID": "1", "SLURM_NNODES": "2"}
    slurm |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "16"}
    assert LaunchEnv.parse(slurm) == LaunchEnv(slurm=SlurmEnv("7", "n2", 1, 2, 4, 16))
    monkeypatch.setattr(os, "environ", dict(LAUNCHED))
    assert LaunchEnv.current() == expected


@pytest.mark.parametrize(
    ("visible", "gpus", "device", "share"),
    [
        (None, 4, "1", 1),
        (None, 1, "0", 2),  # two processes share it
        ("5", 1, "5", 2),
        ("4,6", 2, "6", 1),
        ("4,5,6", 3, "5", 1),
        ("GPU-7f, GPU-a2", 2, "GPU-a2", 1),
        ("", 0, "", None),
    ],
)
def test_a_detached_process_is_alone_on_its_own_device(
    visible: str | None, gpus: int, device: str, share: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr(os, "environ", LAUNCHED | given)
    alone = detach_from_launcher(LaunchEnv.current())
    assert alone == LaunchEnv(local_world_size=2, processes_per_gpu=share, **ACCELERATE)
    # Processes that train alone still share the memory of their machine, and a GPU where there are fewer of them.
    kept = ("LOCAL_WORLD_SIZE", *(name for name in LAUNCHED if name.startswith("ACCELERATE_") and "USE" not in name))
    changed = {"CUDA_VISIBLE_DEVICES": device} | ({PROCESSES_PER_GPU: str(share)} if share else {})
    assert os.environ == {name: LAUNCHED[name] for name in kept} | changed
    assert detach_from_launcher(alone) == alone
    assert os.environ["CUDA_VISIBLE_DEVICES"] == device


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NNODES"])
def test_a_broken_variable_is_named_and_an_empty_one_is_none(name: str) -> None:
    assert LaunchEnv.parse({name: ""}) == LaunchEnv()
    with pytest.raises(UserError, match=rf"^{name} = 'many': .* must be a whole number; unset it$"):
        LaunchEnv.parse({"RANK": "0", name: "many"})


def test_a_local_rank_without_a_rank_is_a_leftover() -> None:
    with pytest.raises(UserError, match=r"^LOCAL_RANK = '0' is set in the environment, and RANK is not: .*; unset it$"):
        LaunchEnv.parse({"LOCAL_RANK": "0"})


@pytest.mark.parametrize("name", ["ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"])
def test_a_switch_of_accelerate_that_is_none(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name} = 'maybe': .* must be true or false; unset it$"):
        LaunchEnv.parse({name: "maybe"})
    assert LaunchEnv.parse({name: "True"}) == LaunchEnv.parse({name: "0"}) == LaunchEnv()
