from support.processes import finish, free_port, start

from microdit_jax.machine import agreement


def test_facts():
    facts = agreement.software()
    assert facts["version of jax"].startswith("0.") and len(facts["source of microdit_jax"]) == 16
    assert agreement.devices() == {"devices": "8 of cpu"}
    assert agreement.flat({"a": {"b": 1, "c": (2, "x")}, "d": None}) == {
        "a.b": "1", "a.c": '[2, "x"]', "d": "null",
    }  # fmt: skip
    agreement.agree({"seed": 1})  # alone, with nobody to differ from


def test_a_difference_names_both_values_and_hosts():
    """On all processes, and before any device is opened."""
    program = """
from microdit_jax.machine import agreement
def main(arguments):
    number = int(arguments[1])
    with hosts.job(arguments[0], 3, number, timeout_seconds=60.0):
        agreement.agree({"seed": 7, "rate": 0.1})
        agreement.agree({"seed": 7 + (number == 2), "rate": 0.1, f"data {number // 2}": "emoji"})
boundary.run_command("__main__")
"""
    address = f"localhost:{free_port()}"
    results = finish([start(program, address, number, devices=1) for number in range(3)])
    for status, _, text in results:
        assert status == 2, results
        assert text.startswith("error: process 0 ("), results
        assert "expected the same on all processes, found data 0 emoji on process 0 (" in text
        assert "absent on process 2 (" in text
        assert "; seed 7 on process 0 (" in text and ") and 8 on process 2 (" in text
        assert "rate" not in text
