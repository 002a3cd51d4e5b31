"""Backbones: frozen timm transformers, described and built here and nowhere else."""
