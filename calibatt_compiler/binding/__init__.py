"""Binds the sites of a captured graph to what serves them, whichever part of a model it is."""
