"""Networks and frozen towers by name or path, each converted once and kept."""
