"""Ids on disk and in batches."""
