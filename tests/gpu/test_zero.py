"""ZeRO-3 on GPUs: none holds the backbone whole while it is built."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.zero3_start import save_random
from tests.running import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]
SOURCE = """
import json, sys, torch
from pathlib import Path
from benchmarks.zero3_start import measure
found = measure("vit_base_patch16_224", Path(sys.argv[1]))
print(json.dumps(found | {"allocated": torch.cuda.max_memory_allocated()}))
"""


def test_a_gpu_never_holds_the_whole_backbone(tmp_path: Path) -> None:
    file, count = tmp_path / "weights.safetensors", min(2, torch.cuda.device_count())
    if count < 2:
        pytest.skip("one GPU shards nothing")
    save_random("vit_base_patch16_224", file)
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    variables = os.environ | {
        "WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}", "MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}",
        "ACCELERATE_USE_DEEPSPEED": "true", "PYTHONPATH": str(ROOT),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "launch" / "accelerate" / "zero3.json"),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SOURCE, str(file)],
            env=variables | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        found_there = json.loads(process.communicate()[0].splitlines()[-1])
        assert found_there["bit_equal"]
        assert found_there["allocated"] < 0.65 * found_there["whole"]
