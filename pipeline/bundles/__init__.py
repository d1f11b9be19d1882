"""Trained generators as directories on disk, and as versions in the model registry."""
