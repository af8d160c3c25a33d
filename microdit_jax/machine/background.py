"""Threads that give way to the computation where both share the processors."""

import os
import sys
import threading

NICENESS = 10  # a tenth of the share of a thread that computes


def give_way() -> None:
    """Lowers the priority of the calling thread, and of the threads that it starts from now on.

    Reading data and writing checkpoints then fill the gaps between the steps instead of slowing
    them. On a CPU backend that is a few per cent of a run; on accelerators, whose hosts have cores
    to spare, nothing. Elsewhere than on Linux priorities belong to processes: nothing happens.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
