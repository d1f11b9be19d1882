"""An evaluation as one self-contained HTML page, and the same as JSON."""
