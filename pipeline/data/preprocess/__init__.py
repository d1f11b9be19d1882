"""Shards to pixels, and pixels and captions to tokens and states, with Ray Data."""
