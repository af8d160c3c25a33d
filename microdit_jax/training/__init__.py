"""Everything one training stage is made of; microdit_jax.train puts it together."""
