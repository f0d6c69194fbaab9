"""Validation: what a plan keeps, or errs, on inputs it has not seen."""
