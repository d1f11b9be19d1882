"""How good a generator is: subjects, judges, measurements of every image, metrics and reports."""
