"""What a run's adapters are good for."""
