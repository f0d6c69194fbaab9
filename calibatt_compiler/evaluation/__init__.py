"""Runs pipelines and measures: quality, time, and dense beside sparse."""
