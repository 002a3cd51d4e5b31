"""dist_vpt: tune frozen vision transformers across many GPUs, and pay only for what you tune."""

__version__ = "0.1.0"
