"""Processes of one run as copies of the test's process, which start at once: torchrun takes seconds."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback

SECONDS = 120


def environment(rank, world):
    """What torchrun tells process `rank` of `world`, but for the place where they meet."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}


def start(world, work):
    """The processes that run `work(rank)`, and the pipes that bring what it returned or raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context, started = multiprocessing.get_context("fork"), []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        values = environment(rank, world) | {"MASTER_PORT": port}
        process = context.Process(target=_run, args=(work, rank, values, sender), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    return started


def results(started):
    """What each process returned or raised, None for one that died; fails where one hangs."""
    found, until = [], time.monotonic() + SECONDS
    for process, receiver in started:
        try:
            assert receiver.poll(max(0, until - time.monotonic())), "a process hangs"
            found.append(pickle.loads(receiver.recv_bytes()))
        except EOFError:
            found.append(None)
        finally:
            process.join(SECONDS / 10)
            process.kill()
    return found


def run(world, work):
    """What `work(rank)` returned or raised in each of `world` processes."""
    return results(start(world, work))


def _run(work, rank, values, sender):
    os.environ.update(values)
    try:
        found = work(rank)
    except Exception as error:
        found = error
        if type(error).__module__ == "builtins":
            traceback.print_exc()
    sender.send_bytes(pickle.dumps(found))  # whole: what shares memory would end with this process
    sender.close()
    os._exit(0)
