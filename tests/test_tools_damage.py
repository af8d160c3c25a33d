"""Files of every format, damaged at random: one line, or equal values where there are checksums."""

from tools.damage import Format, compare, formats, run


def test_a_few_of_each(tmp_path):
    """The command does thousands: python -m tools.damage --count=2000."""
    made = formats(tmp_path)
    assert len(made) == 8
    for name, one in made.items():
        assert run(name, one, 15).startswith(name)


def test_other_values_in_spite_of_checksums_are_noticed(tmp_path):
    good = formats(tmp_path)["legacy pt"]
    blind = Format(good.file, good.read, checked=True)
    try:
        run("legacy pt", blind, 60)
    except AssertionError as error:
        assert "other values in spite of checksums" in str(error)
    else:
        raise AssertionError("a format without checksums passed for one with them")
    assert compare({"a": 1}, {"a": 1, "b": 2}) == "some skipped"
    assert compare({"a": 2}, {"a": 1}) == "other values"
