"""Where captioned pictures come from, one module each."""
