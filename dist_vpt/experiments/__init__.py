"""What people ask for: runs, sweeps, suites, compressions."""
