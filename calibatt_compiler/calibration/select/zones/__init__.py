"""The fit of octave zones: one price of a kept block for the whole plan."""
