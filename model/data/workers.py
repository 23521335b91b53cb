"""An ordered map over worker processes, for work that a killed process must neither hang nor outlive.

What multiprocessing does not do as it comes: bounded queues with results in order, an end to the workers when the
parent is killed, and an end to the parent when a worker is. Here each worker has one socket to its parent and nobody
else has an end of it, so that the death of either side is the end of the file for the other. Workers are fresh
interpreters, not forks: the parent may hold threads of torch, Arrow or the tokenizers library, whose locks a fork would
copy as they happen to be; and not multiprocessing's "spawn", which runs the caller's main module again. A start costs
half a second.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from typing import Any

AHEAD = 2  # items that a worker holds: the one in work and the next
WINDOW = 4  # items a worker that may be under way in all, or wait for an earlier one: what bounds the memory
SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ENVIRONMENT = {**SINGLE, "TOKENIZERS_PARALLELISM": "false"}  # the processes are the parallelism


class WorkerDied(RuntimeError):
    """A worker process ended before its work did: one line that says how."""


def ordered_map(prepare: Callable[[Any], Callable], argument: Any, items: Iterable, n_workers: int) -> Iterator:
    """``map(prepare(argument), items)`` with the function made and applied in `n_workers` other processes, 0 for none.

    Results come in the order of the items, which are read only a few ahead. `prepare` must be a function of a module
    other than __main__; argument, items and results are pickled. An exception in a worker is raised here; WorkerDied if
    one was killed. Leaving the iterator, by an exception or `close` too, ends the workers.
    """
    if not n_workers:
        yield from map(prepare(argument), items)
        return
    connections, processes = [], []
    try:
        for _ in range(n_workers):
            ours, theirs = Pipe()
            with theirs:
                processes.append(_start(theirs.fileno()))
            connections.append(ours)
            _send(ours, (prepare, argument), processes[-1])
        yield from _in_order(iter(items), connections, processes)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            try:
                process.wait(timeout=5)  # at the end of its file it ends, whatever it is doing
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _in_order(items: Iterator, connections: list[Connection], processes: list[subprocess.Popen]) -> Iterator:
    owner = dict(zip(connections, processes, strict=True))
    held = {connection: [] for connection in connections}  # numbers of the items that it has
    results, sent, done, more = {}, 0, 0, True
    while True:
        while more and sent - done < WINDOW * len(connections):
            idlest = min(connections, key=lambda connection: len(held[connection]))
            if len(held[idlest]) >= AHEAD:
                break
            try:
                item = next(items)
            except StopIteration:
                more = False
                break
            _send(idlest, item, owner[idlest])
            held[idlest].append(sent)
            sent += 1
        if done == sent:
            return
        if done not in results:
            for connection in wait([connection for connection in connections if held[connection]]):
                results[held[connection].pop(0)] = _receive(connection, owner[connection])
        while done in results:
            result = results.pop(done)
            done += 1
            yield result


def _start(descriptor: int) -> subprocess.Popen:
    code = f"from {__name__} import work; work({descriptor})"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],  # -P: no module of the folder we happen to be in
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT},
        process_group=0,  # Ctrl-C is the parent's to handle
    )


def _send(connection: Connection, item: Any, process: subprocess.Popen) -> None:
    try:
        connection.send(item)
    except (BrokenPipeError, ConnectionResetError):
        raise _death(process) from None


def _receive(connection: Connection, process: subprocess.Popen) -> Any:
    try:
        failed, result = connection.recv()
    except (EOFError, ConnectionResetError):
        raise _death(process) from None
    if failed:
        raise result
    return result


def _death(process: subprocess.Popen) -> WorkerDied:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        code = None
    how = f"exited with code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory? fewer --workers need less)"
    return WorkerDied(f"worker process {process.pid} {how}")


# --- in the worker ----------------------------------------------------------------------------------------------------


def work(descriptor: int) -> None:
    """The life of a worker: a function, then items, until the other end is closed."""
    connection, inbox = Connection(descriptor), SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    function = None
    while True:
        received = inbox.get()
        try:
            item = pickle.loads(received)
            if function is None:
                prepare, argument = item
                function = prepare(argument)
                continue
            answer = (False, function(item))
        except Exception as error:
            answer = (True, _portable(error))
        try:
            connection.send(answer)
        except OSError:
            os._exit(1)


def _listen(connection: Connection, inbox: SimpleQueue) -> None:
    """A thread of its own: the parent's sends never wait for our work, and its end is ours, even in the midst of it."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
