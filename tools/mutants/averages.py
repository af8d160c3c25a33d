"""Faults in averages of any length, and in which emoji images a run trains on and holds out."""

_PROFILES, _SNAPSHOTS = (
    "microdit_jax/checkpoints/profiles.py",
    "microdit_jax/checkpoints/snapshots.py",
)
_AVERAGES, _TWEMOJI = "microdit_jax/training/averages.py", "microdit_jax/data/twemoji.py"
_TEST_PROFILES = "tests/test_checkpoints_profiles.py"
_TEST_AVERAGES, _TEST_TWEMOJI = "tests/test_training_averages.py", "tests/test_data_twemoji.py"


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> dict:
    return {"name": name, "file": file, "old": old, "new": new, "tests": list(tests)}


MUTANTS = [
    _fault("a length is the exponent of another", _PROFILES,
           "[1.0, 7.0, 16.0 - inverse, 12.0 - inverse]",
           "[1.0, 7.0, 16.0 - inverse, 11.0 - inverse]",
           f"{_TEST_PROFILES}::test_the_length_is_the_deviation_of_the_profile"),
    _fault("profiles that end at other steps are taken for longer ones", _PROFILES,
           "np.where(t < s, h, g)", "np.where(t < s, g, h)", _TEST_PROFILES),
    _fault("snapshots' weights need not sum to 1", _PROFILES,
           "system[:n, :n], system[n, n] = a / square, 0.0",
           "system[:n, :n], system[n, n], system[n, :n] = a / square, 1.0, 0.0", _TEST_PROFILES),
    _fault("averages begin with training and not with the stage", _AVERAGES,
           "(step - averages.start).astype", "step.astype",
           f"{_TEST_AVERAGES}::test_tracked_averages_are_the_sums_written_out"),
    _fault("the newest step's share is rounded away", _AVERAGES,
           "-jnp.expm1((exponent + 1) * jnp.log1p(-1 / t))", "1 - (1 - 1 / t) ** (exponent + 1)",
           f"{_TEST_AVERAGES}::test_the_newest_step_counts_exactly_after_many"),
    _fault("snapshots after a resume's step stay", _SNAPSHOTS,
           "        self._store.go_on_from(start)\n", "        self._store.go_on_from(last)\n",
           f"{_TEST_AVERAGES}::test_a_run_that_resumes_takes_later_snapshots_again"),
    _fault("a checkpoint does not wait for its snapshot", _SNAPSHOTS,
           "= checkpoints.wait, self._store.wait", "= checkpoints.wait, lambda: None",
           f"{_TEST_AVERAGES}::test_a_checkpoint_waits_for_the_snapshot_of_its_step"),
    _fault("the last step has no snapshot", _SNAPSHOTS,
           "(step % self._every == 0 or step == self._last)", "step % self._every == 0",
           _TEST_AVERAGES),
    _fault("any length is made, however badly", _SNAPSHOTS,
           "if misfit > profiles.MISFIT:", "if misfit > 9:",
           f"{_TEST_AVERAGES}::test_lengths_that_cannot_be_made"),
    _fault("damaged snapshots are summed", _SNAPSHOTS,
           "if fault := folder.fault(step):", 'if fault := "":',
           f"{_TEST_AVERAGES}::test_damaged_snapshots_are_left_out"),
    _fault("every run's training images are those of the oldest rule", _TWEMOJI,
           "return {split: names(split) or DEFAULT_SETS[split] for split in SPLITS}",
           "return DEFAULT_SETS", _TEST_TWEMOJI),
    _fault("untoned sets have skin tones", _TWEMOJI,
           "if not (untoned and _TONE in image.caption)", "if True", _TEST_TWEMOJI),
]  # fmt: skip
