"""Captioned images on their way to training: sources, shards, preprocessing."""
