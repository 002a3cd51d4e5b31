"""Which of a machine's GPUs a process computes on, chosen before anything opens a context on one."""

import os

from dist_vpt.distributed.launch_env import LaunchEnv

# With it torch asks the driver's management library (NVML) whether there is a GPU, which leaves no trace on one.
ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def select_device(kind: str, launch: LaunchEnv) -> None:
    """Make this process's GPU the current one; with ``kind`` cpu, see to it that no GPU is touched.

    To be called before any probe of a kernel, a compiler or a precision: each opens a context on the current device,
    which is GPU 0 for all processes of a machine until then.
    """
    import torch

    if kind == "cpu":
        os.environ.setdefault(ASK_NVML, "1")
    elif torch.cuda.is_available():
        torch.cuda.set_device((launch.local_rank or 0) % torch.cuda.device_count())
