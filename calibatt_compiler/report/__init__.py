"""What the backend reports of a plan and of a compiled model: summaries, tables, pages."""
