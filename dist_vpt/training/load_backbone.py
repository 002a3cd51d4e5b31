"""The backbone's weights where they are computed with; under ZeRO-3 each process gets its shards, and never all."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dist_vpt.backbones.weights.deferred import read_deferred
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.methods.base import Method
from dist_vpt.runtime.allocator import give_back_freed_memory
from dist_vpt.training.accelerator import strategy_name


def load_backbone(accelerator: RankAccelerator, method: Method) -> None:
    """Read what the backbone has left in its file. A collective call under ZeRO-3.

    There each tensor of the blocks is sharded as soon as it is read, so that neither the host nor a GPU holds more
    than a process's shards and one tensor of a safetensors file. What is already in memory (random weights, quantized
    ones, files that lack some, pickles) is sharded one by one too, and a GPU never holds it whole.
    """
    if strategy_name(accelerator) != "zero3":
        for _ in read_deferred(method):
            pass
        return
    if accelerator.device.type == "cpu":
        give_back_freed_memory()  # from here on a process holds its shard of the weights
    shard = _sharder(accelerator)
    for block in method.backbone.blocks:
        for parameter in _parameters(block):
            shard(parameter)
    # DeepSpeed's engine moves no module that has sharded parameters; those that it has still to shard move here.
    method.to(accelerator.device)


def _parameters(block: nn.Module) -> Iterator[nn.Parameter]:
    yield from read_deferred(block)
    yield from block.parameters()  # once more those that are sharded by now, which are left as they are


def _sharder(accelerator: RankAccelerator) -> Callable[[nn.Parameter], None]:
    """A function that shards a parameter among all processes as DeepSpeed's engine would."""
    import deepspeed

    config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    sharding = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    sizes = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "train_batch_size")}
    sizes["gradient_accumulation_steps"] = config["gradient_accumulation_steps"]
    # Parameters keep their own types; this one is of tensors made within the context, of which there are none.
    init = deepspeed.zero.Init(config_dict_or_path=sizes | {"zero_optimization": sharding}, dtype=torch.float32)
    return lambda parameter: init._convert_to_zero_parameters([parameter])
