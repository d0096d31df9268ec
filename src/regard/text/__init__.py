"""Strings and tokens: parallel files in, checked pairs out; text to ids and back."""
