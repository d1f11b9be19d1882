"""Captioned pictures from anywhere: a file here is a `Source` (pipeline/contracts.py)."""

from pipeline import registry

__path__ = registry.search_path(__name__)
