"""All that knows about pictures, captions, models and numbers: importable, no CLI, no HTTP."""

__version__ = "0.1.0"
