import os
import signal
import threading

import pytest
from test_machine_hosts import finish, free_port, start

from microdit_jax.machine.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.received and not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.received and stop.agreed()
    assert signal.getsignal(number) == before
    assert f"{number.name}: saving and stopping" in capfd.readouterr().err


def test_another_thread_is_left_alone():
    stops = []

    def ask():
        with StopRequest() as stop:
            stops.append(stop.agreed())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert stops == [False] and signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_kills():
    program = """
    with signals.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        print("stopping", stop.agreed(), flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        print("still here")
    """
    ((status, text, _),) = finish([start(program)])
    assert status == -signal.SIGINT and text == "stopping True\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_processes_agree(name):
    """One of two gets the signal; both stop after the same step, soon."""
    program = """
    number = int(sys.argv[2])
    hosts.initialize(sys.argv[1], 2, number, timeout_seconds=60.0)
    with signals.StopRequest() as stop:
        for step in range(400):
            hosts.barrier("step")  # as a collective would
            time.sleep(0.02)
            if step == 20 and number == 1:
                os.kill(os.getpid(), getattr(signal, sys.argv[3]))
            if stop.agreed():
                print("stopped", step)
                break
    """
    address = f"localhost:{free_port()}"
    results = finish([start(program, address, number, name, devices=1) for number in range(2)])
    assert [status for status, _, _ in results] == [0, 0], results
    (first, second) = (text.split("stopped")[1] for _, text, _ in results)
    assert first == second and 20 < int(first) < 399
