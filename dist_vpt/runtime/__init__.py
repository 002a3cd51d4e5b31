"""How a model is computed, applied to it from outside: kernels, checkpointing, compilation, offload, int8."""
