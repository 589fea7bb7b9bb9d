"""Faults for the fuzzer to find: each makes a case, in the fuzzer's process, that goes wrong in one way."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from bench.fuzz.runner import WrongResultError


def crash(bundle, directory):
    return lambda random, directory, note: os.kill(os.getpid(), signal.SIGSEGV)


def abort(bundle, directory):
    return lambda random, directory, note: os.abort()


def leave(bundle, directory):
    return lambda random, directory, note: os._exit(3)


def spin(bundle, directory):
    def case(random, directory, note):
        note("spins")
        while True:
            pass

    return case


def wait(bundle, directory):
    return lambda random, directory, note: time.sleep(60)


def wait_at_exit(bundle, directory):
    threading.Thread(target=time.sleep, args=(60,)).start()
    return lambda random, directory, note: "answered"


def raise_error(bundle, directory):
    return lambda random, directory, note: {}["absent"]


def panic(bundle, directory):
    class Panic(BaseException):
        pass

    def case(random, directory, note):
        raise Panic("as pyo3's PanicException")

    return case


def raise_in_thread(bundle, directory):
    def case(random, directory, note):
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        return "answered"

    return case


def take_memory(bundle, directory):
    def case(random, directory, note):
        bytearray(b"x") * (250 * 2**20)
        return "answered"

    return case


def be_wrong(bundle, directory):
    def case(random, directory, note):
        raise WrongResultError("not 42")

    return case


def sometimes_crash(bundle, directory):
    def case(random, directory: Path, note):
        note(f"drew {random.random()}")
        (directory / "file").touch(exist_ok=False)
        if random.random() < 0.3:
            os.abort()
        return "refused"

    return case
