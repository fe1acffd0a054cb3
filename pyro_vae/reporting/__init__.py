"""What leaves the library for other tools: ArviZ."""
