"""How a model is computed, applied from outside: attention kernels, checkpointing, compilation, offload, int8."""
