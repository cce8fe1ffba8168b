"""Whole models to read and to train; not part of the wheel."""
