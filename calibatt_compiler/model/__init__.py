"""What is known of a model beside its graph: its family, its frames, its callers, its tokens."""
