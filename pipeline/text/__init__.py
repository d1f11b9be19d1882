"""Captions: pretrained language models that read them, and where these come from."""
