"""Observation: a model compiled so that its attention is seen, and what is taken of each call."""
