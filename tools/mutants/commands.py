"""Faults in how commands begin, fail and end."""

_BOUNDARY = "tests/test_commands_boundary.py"
_PROCESSES = "tests/test_commands_processes.py"
_SIGNALS = [f"{_PROCESSES}::test_signals_end_a_command_soon"]

MUTANTS = [
    {
        "name": "Ctrl-C waits for what C++ does",
        "file": "microdit_jax/machine/interrupts.py",
        "old": "    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)",
        "new": "    pass",
        "tests": _SIGNALS,
    },
    {
        "name": "a callback swallows Ctrl-C for as long as it likes",
        "file": "microdit_jax/commands/boundary.py",
        "old": "        interrupts.end(error.number)",
        "new": "        return",
        "tests": [f"{_PROCESSES}::test_a_swallowed_signal_ends_the_process_at_once"],
    },
    {
        "name": "SIGTERM ends a command with the status of Ctrl-C",
        "file": "microdit_jax/commands/boundary.py",
        "old": "            return interrupts.status_if_stopped(128 + number)",
        "new": "            return interrupts.status_if_stopped(128 + signal.SIGINT)",
        "tests": _SIGNALS,
    },
    {
        "name": "nohup does not keep SIGHUP away",
        "file": "microdit_jax/machine/interrupts.py",
        "old": "        if signal.getsignal(number) is not signal.SIG_IGN:",
        "new": "        if True:",
        "tests": [f"{_PROCESSES}::test_ignored_signals_stay_ignored"],
    },
    {
        "name": "a forked child writes its signals into its parent's pipe",
        "file": "microdit_jax/machine/interrupts.py",
        "old": "    os.register_at_fork(after_in_child=_release)\n",
        "new": "",
        "tests": [f"{_PROCESSES}::test_a_child_process_has_its_own_signals"],
    },
    {
        "name": "a reader that goes away ends the command",
        "file": "microdit_jax/commands/output.py",
        "old": "            self._lose(error)\n            return len(text)",
        "new": "            raise",
        "tests": [f"{_PROCESSES}::test_a_reader_that_goes_away_ends_nothing"],
    },
    {
        "name": "output lost on a full disk is a success",
        "file": "microdit_jax/commands/boundary.py",
        "old": "        status = status or 2",
        "new": "        pass",
        "tests": [f"{_PROCESSES}::test_output_that_cannot_be_written"],
    },
    {
        "name": "a file takes the number of a closed standard output",
        "file": "microdit_jax/commands/output.py",
        "old": "            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)",
        "new": "            pass",
        "tests": [f"{_PROCESSES}::test_closed_streams"],
    },
    {
        "name": "a character that the terminal lacks ends the command",
        "file": "microdit_jax/commands/output.py",
        "old": 'errors="backslashreplace"',
        "new": 'errors="strict"',
        "tests": [f"{_PROCESSES}::test_a_terminal_that_cannot_show_it"],
    },
    {
        "name": "a defect looks like bad input",
        "file": "microdit_jax/commands/boundary.py",
        "old": "    return 1, _defect(error)",
        "new": "    return 2, _defect(error)",
        "tests": [f"{_BOUNDARY}::test_a_defect_leaves_its_traceback"],
    },
    {
        "name": "a loop of links is found after the work",
        "file": "microdit_jax/files/writing.py",
        "old": "            with contextlib.suppress(FileNotFoundError):\n                if stat",
        "new": "            with contextlib.suppress(OSError):\n                if stat",
        "tests": ["tests/test_files.py"],
    },
    {
        "name": "write_json writes in place",
        "file": "microdit_jax/files/writing.py",
        "old": '    write_text(path, json.dumps(contents, indent=1, ensure_ascii=False) + "\\n")',
        "new": "    Path(path).write_text(json.dumps(contents, indent=1))",
        "tests": ["tests/test_files.py"],
    },
    {
        "name": "the installed configuration hides one's own",
        "file": "microdit_jax/commands/config_file.py",
        "old": "    if not folder and not Path(name).exists() and",
        "new": "    if not folder and",
        "tests": ["tests/test_commands_cli.py::test_configs_of_an_installed_package"],
    },
]
