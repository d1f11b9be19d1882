"""The families' networks, objectives and generators; pipeline/models/NAME.py says what each is."""
