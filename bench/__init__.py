"""Measurements: what vmishim costs, and how that grows."""
