"""Images in memory: pixels, augmentation, mirroring, grids with captions."""
