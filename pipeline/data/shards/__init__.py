"""Shard sets: WebDataset tars beside a manifest, written, read and checked."""
