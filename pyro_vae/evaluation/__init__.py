"""Numbers that say how good a fitted pair is, with standard errors."""
