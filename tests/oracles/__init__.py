"""Truths written as loops from the formulas; nothing here imports irpe."""
