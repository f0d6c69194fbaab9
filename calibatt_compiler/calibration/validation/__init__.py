"""Validation: how much attention a plan keeps on inputs it has not seen."""
