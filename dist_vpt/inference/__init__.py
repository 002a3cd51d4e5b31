"""Using a run's adapters: loading, predicting, evaluating, merging, attention maps."""
