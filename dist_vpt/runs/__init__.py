"""The run folder: what a run writes, and what it was made with."""
