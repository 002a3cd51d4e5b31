"""Slow float64 mathematics written apart from the package, for its tests to compare with."""
