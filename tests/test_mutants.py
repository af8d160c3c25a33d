"""The list of faults fits the code: `make mutants`, which runs them, takes too long for each CI."""

import pytest

from tools.mutants import all_mutants

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.room}: {mutant.name}")
def test_entry_fits_the_code(mutant):
    assert not mutant.fault_of_entry()
    assert mutant.old != mutant.new


def test_names_are_unique():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
