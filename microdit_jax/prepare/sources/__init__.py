"""Where captioned pictures come from, one module each; `registry` opens them by name."""
