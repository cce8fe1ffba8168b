"""Whole models, written to be read; not part of the wheel."""
