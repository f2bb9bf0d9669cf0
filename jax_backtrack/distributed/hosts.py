"""Several hosts: starts their processes as one run, lets them compare notes, and ends all of them when one has ended.

One process per host runs the same command. They meet at a coordinator, which is process 0, and exchange short notes
there. Each looks at the notes once a second, in a thread of its own:

* A process that ends with an error leaves its message as a note (`leave`), and the others end with it, within seconds.
* A process that is killed leaves none. The others find out through `jax.distributed`: its runtime ends a process with
  abort() at once when the coordinator has gone, and `_SILENCE` seconds after the last heartbeat of another one. It
  prints a message and a stack of its own; nothing that can be set keeps it from that. So abort() is caught, and one
  line behind that message says which processes fell silent. Where a collective fails first (on CPU it does, when the
  other end of a connection closes), the process waits for those that fell silent and says the line without the stack.
"""

import ctypes
import faulthandler
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import NoReturn

import jax

try:  # the notes, and what the environment says, have no public names
    from jax._src.clusters import GceTpuCluster
    from jax._src.distributed import global_state
except ImportError:  # a release that has moved them: `start` says so where there are several hosts
    GceTpuCluster = global_state = None

from jax_backtrack.errors import InputError
from jax_backtrack.utils.console import console

_SILENCE = 30  # seconds without a heartbeat after which the runtime takes a process for dead
_QUIET = 8  # seconds without a note after which a process whose collective has failed takes another for dead
_LEAVING = 10  # seconds that process 0 waits for the others' last notes
_FAILING = 30  # seconds that an error may take to pass, while a checkpoint is written to its end
_STUCK = 45  # seconds without a beat of our own after which this process ends, with a traceback of every thread
_PATIENCE_MS = 24 * 60 * 60 * 1000  # of waiting for another process's note: whether it still lives is looked at besides
_NOTES = "jax_backtrack"
_AGAIN = "the same command on every host goes on from the last checkpoint"

_rounds = itertools.count()
_watch: "_Watch | None" = None


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several; must be called before anything asks JAX for its devices.

    coordinator: "HOST:PORT" of process 0, the same on all; processes: how many there are; process: which one this is.
    Without all three, the usual environment of a TPU pod is asked (`TPU_WORKER_HOSTNAMES`, `TPU_WORKER_ID`,
    `MEGASCALE_*`, or the metadata server); on one host nothing happens.

    On all processes but the first the console is silent from then on. Raises InputError where the three do not go
    together, or the processes do not find each other.
    """
    global _watch
    if not asked_for(coordinator, processes, process):
        return
    if global_state is None:
        raise InputError(
            f"several hosts meet by jax._src.distributed.global_state, which jax {jax.__version__} has not: "
            "install an older release"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=_SILENCE)
    except (RuntimeError, ValueError) as error:  # jax.errors.JaxRuntimeError is a RuntimeError
        where = f"--coordinator={coordinator}" if coordinator else "hosts named by the TPU environment"
        raise InputError(f"{where}: the processes did not find each other: {_one_line(error)}") from error
    console.quiet = jax.distributed.is_initialized() and global_state.process_id > 0
    _watch = _Watch()


def asked_for(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> bool:
    """Tells whether the flags, or else the environment, ask for several processes. Raises InputError as `start`
    does."""
    flags = {"--coordinator=HOST:PORT": coordinator, "--processes=N": processes, "--process=I": process}
    if missing := [flag for flag, value in flags.items() if value is None]:
        if len(missing) < len(flags):
            raise InputError(f"{', '.join(flags)} go together; missing: {', '.join(missing)}")
        return _pod_size() > 1
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator={coordinator}: it must be HOST:PORT, of the host that runs --process=0")
    if processes < 1 or not 0 <= process < processes:
        raise InputError(f"--process={process} of --processes={processes}: processes are counted from 0")
    return processes > 1


def several() -> bool:
    """Tells whether this is one of several processes. Asks no device."""
    return global_state is not None and global_state.num_processes > 1


def check_started() -> None:
    """Raises InputError where JAX sees devices of several hosts, but `start` was not told of them. Asks for devices."""
    if jax.process_count() > 1 and not several():
        raise InputError(
            f"these are devices of {jax.process_count()} hosts, but the environment does not say how they meet: "
            "give each --coordinator=HOST:PORT --processes=N --process=I"
        )


def label() -> str:
    """Returns "process I" of several processes, "" otherwise."""
    return f"process {global_state.process_id}" if several() else ""


def agree(facts: Mapping[str, str]) -> None:
    """Compares facts with the other processes, which must all call this; on one process nothing happens.

    Raises InputError on every process, with the same message, where a fact is not the same everywhere: it names the
    fact, its values, and who holds which.
    """
    if not several():
        return
    client, notes = global_state.client, f"{_NOTES}/facts/{next(_rounds)}"
    client.key_value_set(f"{notes}/{global_state.process_id}", json.dumps(dict(facts)))
    theirs = [
        json.loads(client.blocking_key_value_get(f"{notes}/{process}", _PATIENCE_MS))
        for process in range(global_state.num_processes)
    ]
    names = dict.fromkeys(name for host in theirs for name in host)
    differing = [f"{name} ({told})" for name in names if (told := _who_says_what([host.get(name) for host in theirs]))]
    if differing:
        raise InputError(f"the hosts do not agree on {', '.join(differing)}")


def finish() -> None:
    """Ends the watch over the others: the work is done."""
    if _watch:
        _watch.stop()


def leave(code: int, error: BaseException) -> None:
    """Ends this process, and through its note all others, after `error` was said; on one process it just returns.

    Nothing is waited for that needs the others, such as the barrier at JAX's own exit.
    """
    if _watch:
        _watch.leave(code, _one_line(error))


def failing(error: BaseException) -> None:
    """Notes an error on its way to `leave`, before anything that waits for the other processes.

    Where the error comes of another process's end, this process ends here; otherwise it has some seconds to pass.
    """
    if not _watch or _watch.leaving:
        return
    # What fails in a collective, or in asking for one, is one of these two.
    if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, InputError):
        _watch.end_with_another()
    _watch.end_within(_FAILING, f"{type(error).__name__}: {_one_line(error)}")


def end_with_another() -> None:
    """Ends this process if another one has ended, which may take some seconds to show; returns if none has."""
    if _watch:
        _watch.end_with_another()


def leave_with_traceback(error: BaseException) -> None:
    """Leaves, as `leave` does, for an error that is not the user's, which another process's end may have brought
    about."""
    if not _watch:
        return
    failing(error)
    traceback.print_exception(error)
    _watch.leave(1, f"{type(error).__name__}: {_one_line(error)}")


class _Watch:
    """Looks at the notes of the other processes, and ends this one when one of them has ended."""

    def __init__(self):
        self._client, self._process = global_state.client, global_state.process_id
        self._others = [process for process in range(global_state.num_processes) if process != self._process]
        self._seen = dict.fromkeys(self._others, ("", time.monotonic()))  # last beat, and when it was new
        self._stopped, self._leaving = threading.Event(), threading.Event()
        self._speaking = threading.Lock()
        self._catch_abort()
        threading.Thread(target=self._run, name="hosts", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def leave(self, code: int, message: str) -> NoReturn:
        """Leaves a note and ends. Process 0 holds the notes: it stays until the others that live have left theirs."""
        self._leaving.set()
        try:
            note = json.dumps({"code": code, "message": message})
            self._client.key_value_set(f"{_NOTES}/ended/{self._process}", note, allow_overwrite=True)
            until = time.monotonic() + _LEAVING
            while self._process == 0 and time.monotonic() < until:
                if not set(self._others) - self._ended().keys() - set(self._silent(_QUIET)):
                    break
                time.sleep(0.1)
        except RuntimeError:
            pass  # the coordinator has gone, so nobody reads notes
        self._exit(code)

    @property
    def leaving(self) -> bool:
        """Whether this process is on its way out."""
        return self._leaving.is_set()

    def end_with_another(self) -> None:
        """Ends this process if another one has ended, which the thread sees, or falls silent; returns if none has."""
        until = time.monotonic() + _QUIET + 5
        while time.monotonic() < until:
            if silent := self._silent(_QUIET):
                self._say(f"{_names(silent)} stopped without a word; {_AGAIN}")
                self.leave(1, f"{_names(silent)} stopped without a word")
            time.sleep(0.2)

    def end_within(self, seconds: float, message: str) -> None:
        """Ends this process after so many seconds, unless it has ended by then."""

        def late() -> None:
            self._say(message)
            self.leave(1, message)

        self._leaving.set()
        timer = threading.Timer(seconds, late)
        timer.daemon = True
        timer.start()

    def _run(self) -> None:
        try:
            for beat in itertools.count():
                # Where this thread gets no further, stuck in a call to a coordinator that has gone, or for want of the
                # interpreter's lock, the process ends without its help.
                faulthandler.dump_traceback_later(_STUCK, exit=True)
                if self._stopped.wait(1.0):
                    faulthandler.cancel_dump_traceback_later()
                    return
                self._client.key_value_set(f"{_NOTES}/beat/{self._process}", str(beat), allow_overwrite=True)
                beats = self._notes("beat")
                for process in self._others:
                    if beats.get(process, "") != self._seen[process][0]:
                        self._seen[process] = beats[process], time.monotonic()
                ended = {process: note for process, note in self._ended().items() if process != self._process}
                if ended:
                    self._follow(*min(ended.items()))
        except RuntimeError:  # the runtime ends this process for the same reason, a moment later
            self._seen[0] = "", -float("inf")

    def _follow(self, process: int, note: str) -> None:
        """Ends after another process; first, what is wrong there may be wrong here too, and is said here in order."""
        note = json.loads(note)
        if self._leaving.wait(2.0):
            time.sleep(_FAILING)
            self._exit(note["code"])
        self._say(f"process {process} ended: {note['message']}")
        self.leave(note["code"], f"process {process} ended: {note['message']}")

    def _silent(self, seconds: float) -> list[int]:
        return [process for process, (_, when) in self._seen.items() if time.monotonic() - when > seconds]

    def _ended(self) -> dict[int, str]:
        return self._notes("ended")

    def _notes(self, kind: str) -> dict[int, str]:
        folder = self._client.key_value_dir_get(f"{_NOTES}/{kind}/")
        return {int(key.rpartition("/")[2]): value for key, value in folder}

    def _say(self, what: str, wait: bool = True) -> None:
        """Says why this process ends; several threads may come to know, and the first one speaks. The others wait here
        for the end that it brings; without `wait` they go on to bring it themselves, should it hang."""
        if self._speaking.acquire(blocking=wait):  # never released
            print(f"error: process {self._process}: {what}", file=sys.stderr, flush=True)

    def _exit(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # sys.exit would wait for the others at a barrier

    def _catch_abort(self) -> None:
        """Installs a handler by C's `signal`: handlers of Python run later, in the main thread, and abort() does not
        wait for that."""

        def aborted(_signal) -> None:
            # Without a silence before it, it is the connection to the coordinator that broke.
            silent = self._silent(_QUIET) or [0]
            self._say(
                f"ended by the JAX runtime, see above: {_names(silent)} stopped without a word; {_AGAIN}", wait=False
            )
            self._exit(1)

        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # must live as long as it may be called
        ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), self._aborted)


def _pod_size() -> int:
    """Returns how many hosts the TPU environment names, by the variables and the metadata that JAX's own detection
    reads."""
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if names:
        return len(names.split(",")) * int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
    try:
        return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1
    except Exception:  # a TPU without a metadata server to ask, as in a notebook service, is no pod
        return 1


def _who_says_what(values: list[str | None]) -> str:
    """Returns "A on process 0; B on processes 1, 2"; "" where all values are the same."""
    if len(set(values)) == 1:
        return ""
    holders = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(process)
    return "; ".join(f"{'nothing' if value is None else value} on {_names(who)}" for value, who in holders.items())


def _names(processes: list[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
