"""The search for a token order in which fewer blocks are needed."""
