"""Benchmarks: their sources, their scoring, their figures, their page."""
