"""The run folder: what finished inputs leave on disk, and who may write there."""
