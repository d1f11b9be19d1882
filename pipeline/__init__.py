"""Tessera as a library: data, models, training and evaluation, without command line and HTTP."""

__version__ = "0.1.0"
