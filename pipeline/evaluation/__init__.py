"""How good a generator is: the aligner, evaluation sets, metrics' reports and grids."""
