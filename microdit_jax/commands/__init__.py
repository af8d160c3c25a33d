"""Parts that every command shares: flags, and one boundary for errors and signals."""
