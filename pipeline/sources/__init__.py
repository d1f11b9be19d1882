"""Captioned pictures from anywhere: a file here is a `Source` (pipeline/contracts.py)."""
