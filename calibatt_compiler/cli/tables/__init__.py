"""Tables for the terminal: what calibration, search and validation say."""
