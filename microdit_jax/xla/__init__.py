"""The XLA lab: compile for machines you do not have, count everything, compare variants."""
