"""Generating with image tokens: requests, batches in the making, sampling, caches."""
