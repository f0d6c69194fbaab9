"""What the backend tells of a plan and of a compiled model: summaries, tables, pages."""
