"""How the ranks of a job find each other, so that one that never comes is named.

Rank 0 opens the store that torch.distributed needs anyway; every rank leaves its host and process there, and waits for
all the others. Without this a missing rank is half an hour of silence and then a number that timed out.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from cpt.train.guard import AskedToStop
from cpt.train.heartbeat import START_SECONDS
from launch.local.ranks import LISTENER

POLL_SECONDS = 0.05
TELL_SECONDS = 2.0  # that a rank which is to stop waits for the others, to tell them
ASKED, VERDICT, GO, STOP = "asked", "verdict", "go", "stop"  # in the store
JOIN_SECONDS = 60.0  # at least: imports from a cold shared file system


def join(*, rank: int, world_size: int, seconds: float, asked_to_stop: Callable[[], bool] = lambda: False) -> Store:
    """The store of the job at MASTER_ADDR and MASTER_PORT, once all ``world_size`` ranks have come.

    Rank 0 alone says whether the job begins: a rank that left on its own while another began would be waited for.

    Raises:
        AskedToStop: a rank was asked to stop before all had come; nobody has trained.
        RuntimeError: some have not come within ``seconds``; it names them, or the host that cannot be reached.
    """
    store = _open_store(rank, world_size, seconds, asked_to_stop)
    keys = {each: f"joined/{each}" for each in range(world_size)}
    began = time.monotonic()
    try:
        store.set(keys[rank], f"host {socket.gethostname()}, process {os.getpid()}")
        while not store.check([VERDICT]):  # the store's own waiting prints a warning a second, which reads like a fault
            if asked_to_stop():
                store.set(ASKED, "")
            if rank == 0 and (store.check([ASKED]) or all(store.check([key]) for key in keys.values())):
                store.set(VERDICT, STOP if store.check([ASKED]) else GO)
            elif time.monotonic() - began >= seconds:
                raise RuntimeError(_missing(store, keys, time.monotonic() - began))
            else:
                time.sleep(POLL_SECONDS)
        if store.get(VERDICT).decode() == STOP:
            if rank == 0:  # the store ends with this rank: first those who wait read from it, and those on their way
                told = time.monotonic() + TELL_SECONDS
                while not all(store.check([key]) for key in keys.values()) and time.monotonic() < told:
                    time.sleep(POLL_SECONDS)
                time.sleep(10 * POLL_SECONDS)
            raise AskedToStop(f"asked to stop before all {world_size} ranks were there; nothing was trained")
    except dist.DistError as error:
        if asked_to_stop():
            raise AskedToStop(f"asked to stop before all {world_size} ranks were there, as was rank 0") from None
        left = f"rank 0 has left before all {world_size} ranks came ({error}); see its output"
        raise RuntimeError(left) from None
    return PrefixStore("job", store)


def start_group(
    backend: str, device: torch.device, *, hang_seconds: float, asked_to_stop: Callable[[], bool] = lambda: False
) -> None:
    """torch.distributed's default group over :func:`join`, for the job that the environment describes.

    Its collectives give up long after the heartbeat's watchdog has named who is missing.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seconds = max(JOIN_SECONDS, hang_seconds)
    store = join(rank=rank, world_size=world_size, seconds=seconds, asked_to_stop=asked_to_stop)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=2 * max(hang_seconds, START_SECONDS)),
        device_id=device if device.type == "cuda" else None,
    )


def _open_store(rank: int, world_size: int, seconds: float, asked_to_stop: Callable[[], bool]) -> TCPStore:
    """In a thread, for torch waits in C++ until rank 0 answers, and a rank that waits there hears no signal."""
    listener = os.environ.pop(LISTENER, None)
    fd = int(listener) if listener and rank == 0 else None
    address, port, limit = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    outcome: queue.SimpleQueue[TCPStore | Exception] = queue.SimpleQueue()

    def open_store() -> None:
        try:
            outcome.put(
                TCPStore(address, port, world_size, rank == 0, limit, wait_for_workers=False, master_listen_fd=fd)
            )
        except Exception as error:
            outcome.put(error)

    opener = threading.Thread(target=open_store, name="join", daemon=True)
    opener.start()
    while opener.is_alive() and not asked_to_stop():
        opener.join(POLL_SECONDS)
    opener.join(TELL_SECONDS)
    if opener.is_alive():
        raise AskedToStop(f"asked to stop before rank {rank} reached rank 0 at {address}:{port}")
    found = outcome.get_nowait()
    if isinstance(found, dist.DistError):
        raise RuntimeError(
            f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port} within {seconds:.0f} s "
            f"({str(found).splitlines()[0]}); is it running, and is the port free and open?"
        )
    if isinstance(found, Exception):
        raise found
    return found


def _missing(store: Store, keys: dict[int, str], seconds: float) -> str:
    came = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
    missing = ", ".join(str(rank) for rank in keys if rank not in came)
    shown = "; ".join(f"rank {rank}: {place}" for rank, place in list(came.items())[:8])
    return (
        f"rank {missing} of {len(keys)} did not join within {seconds:.0f} s (came: {shown}); look at its output, its "
        "host, and whether it reaches MASTER_ADDR"
    )
