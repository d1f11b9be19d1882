"""One thin file per job that a scheduler or a person runs, and cli.py, the `tessera` command."""
