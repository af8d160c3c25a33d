"""The XLA lab: compiles for machines you do not have, counts programs, compares variants."""
