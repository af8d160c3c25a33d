"""Faults in how the processes of a job meet, watch each other and part."""

_HOSTS = "tests/test_machine_hosts.py"
_WATCH = "tests/test_machine_watch.py"
_STOOD_STILL = [f"{_WATCH}::test_one_that_stood_still_judges_nobody_by_the_time_it_missed"]

MUTANTS = [
    {
        "name": "a host that came late is the user's mistake",
        "file": "microdit_jax/machine/preflight.py",
        "old": "        raise (Late if part.late else UserError)(fault)",
        "new": "        raise UserError(fault)",
        "tests": [f"{_HOSTS}::test_a_missing_process_ends_the_others"],
    },
    {
        "name": "a process that hangs is the user's mistake",
        "file": "microdit_jax/machine/watch.py",
        "old": "    if isinstance(error, Late):",
        "new": "    if False:",
        "tests": [f"{_HOSTS}::test_a_late_process_is_named_and_all_end"],
    },
    {
        "name": "groups of devices are connected when they first have work",
        "file": "microdit_jax/machine/hosts.py",
        "old": "for n in range(len(axes)) for g in",
        "new": "for n in [len(axes) - 1] for g in",
        "tests": [f"{_HOSTS}::test_collectives_are_connected_once"],
    },
    {
        "name": "one that stood still waits for others as if it had heard them just then",
        "file": "microdit_jax/machine/silence.py",
        "old": "    return min(now, least if gap > timeout else max(least, since + gap))",
        "new": "    return now",
        "tests": _STOOD_STILL,
    },
    {
        "name": "one that stood still gives up all others at once",
        "file": "microdit_jax/machine/silence.py",
        "old": "    least = now - timeout + moment",
        "new": "    least = since",
        "tests": _STOOD_STILL,
    },
    {
        "name": "words that waited in a socket are a sign of life",
        "file": "microdit_jax/machine/silence.py",
        "old": "                    since = min(now, now - self._timeout + self._moment)",
        "new": "                    since = now",
        "tests": [f"{_WATCH}::test_last_words_that_waited_are_no_sign_of_life"],
    },
    {
        "name": "a network that broke is a defect",
        "file": "microdit_jax/machine/collective_errors.py",
        "old": "    if not _NETWORK.search(str(error)):",
        "new": "    if True:",
        "tests": [f"{_WATCH}::test_a_collective_that_broke_alone_is_late_and_a_defect_stays_one"],
    },
    {
        "name": "a process that stands still before it has joined is waited for until JAX aborts",
        "file": "microdit_jax/machine/lifelines.py",
        "old": "                if time.monotonic() > until and not self._joined.is_set():",
        "new": "                if False:",
        "tests": ["tests/test_machine_lifelines.py"],
    },
]
