"""The search for thresholds that reach a speed-up or a fidelity."""
