"""Experiments: runs, sweeps, suites, compressions."""
