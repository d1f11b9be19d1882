"""How Tessera is deployed: Ray Serve configuration and what runs it."""
