"""Selection: from recorded energies and masks to the patterns of a plan."""
