"""How fast the hosts reach each other, measured by a process on each of them:

    python -m launch.preflight.bandwidth --rank 0 --hosts 4 --master ADDRESS --port 29500

One process per host, over the interface, the port and the back-end (NCCL between GPUs, else gloo) that the job will
use: every host to its two neighbours on a ring, one pair of hosts at a time for each host, and an all-reduce over all.
Prints one JSON object, also where it failed, with the stage that it got to. Owns the measuring, in a few megabytes and
a few seconds; ``launch.preflight.slow_hosts`` judges. A slow way is measured with less, never for longer:

    8 bytes, ten times   64 KiB   512 KiB   4 MiB, four times   the next only if this one took under a quarter second
"""

import argparse
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cpt.exit_codes import EXIT_DONE, EXIT_ENVIRONMENT

if TYPE_CHECKING:
    import torch

SIZES = (*(10 * [8]), 1 << 16, 1 << 19, *(4 * [1 << 22]))  # bytes
ENOUGH_SECONDS = 0.25
JOIN_SECONDS = 20.0  # imports from a cold shared file system
LIMIT_SECONDS = 45
ALL_REDUCE_BYTES = (1 << 18, 1 << 22, 1 << 22, 1 << 22)
POLL_SECONDS = 0.02

Pair = tuple[int, int]


def rounds(num_hosts: int) -> list[list[Pair]]:
    """The links of a ring in rounds in which no host has two of them at once: 5 -> [01 23] [12 34] [40]."""
    if num_hosts < 3:
        return [[(0, 1)]] if num_hosts == 2 else []
    ring = [(host, (host + 1) % num_hosts) for host in range(num_hosts)]
    closing = [ring.pop()] if num_hosts % 2 else []
    return [links for links in (ring[::2], ring[1::2], closing) if links]


def send_timed(send: Callable[[int], None], sizes: Sequence[int] = SIZES) -> tuple[float, float]:
    """Bytes per second of the largest messages, and seconds of the smallest there and back.

    ``send`` sends so many bytes and comes back when the other side has them.
    """
    took: dict[int, float] = {}
    for size in sizes:
        began = time.perf_counter()
        send(size)
        seconds = time.perf_counter() - began
        took[size] = min(seconds, took.get(size, seconds))
        if seconds > ENOUGH_SECONDS and size > 8:
            break
    largest = max(took)
    return largest / took[largest], took[min(took)]


class Peers:
    """The other hosts, by rank: messages of so many bytes with an answer, in torch.distributed's default group."""

    def __init__(self, device: "torch.device") -> None:
        import torch

        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._payload = torch.zeros(max(SIZES), dtype=torch.uint8, device=device)

    def measure(self, peer: int) -> dict[str, float]:
        import torch.distributed as dist

        def send(size: int) -> None:
            self._number.fill_(size)
            dist.send(self._number, peer)
            dist.send(self._payload[:size], peer)
            dist.recv(self._number, peer)
            self._number.item()  # waits for a GPU

        rate, there_and_back = send_timed(send)
        self._number.fill_(0)
        dist.send(self._number, peer)
        return {"bytes_per_second": rate, "round_trip_seconds": there_and_back}

    def answer(self, peer: int) -> None:
        import torch.distributed as dist

        while True:
            dist.recv(self._number, peer)
            size = int(self._number.item())
            if size == 0:
                return
            dist.recv(self._payload[:size], peer)
            dist.send(self._number, peer)


def measure_links(peers: Peers, rank: int, num_hosts: int) -> dict[int, dict[str, float]]:
    """To each neighbour of this rank, by its rank; both directions of a link are measured, one after the other."""
    links = {}
    for pairs in rounds(num_hosts):
        for first, second in pairs:
            if rank == first:
                links[second] = peers.measure(second)
                peers.answer(second)
            elif rank == second:
                peers.answer(first)
                links[first] = peers.measure(first)
    return links


def measure_all_reduce(device: "torch.device", num_hosts: int) -> float:
    """Bytes per second that each host sends, and receives, in a ring: 2 (n - 1) / n of the message in its time."""
    import torch
    import torch.distributed as dist

    best = 0.0
    for size in ALL_REDUCE_BYTES:
        message = torch.ones(size // 4, device=device)
        began = time.perf_counter()
        dist.all_reduce(message)
        summed = message[0].item()
        seconds = torch.tensor([time.perf_counter() - began], device=device)
        assert summed == num_hosts, f"the sum of {num_hosts} ones came out as {summed}"
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # all take the same decision
        best = 2 * (num_hosts - 1) / num_hosts * size / seconds.item()
        if seconds.item() > 2 * ENOUGH_SECONDS:
            break
    return best


def joined(rank: int, num_hosts: int, master: str, port: int) -> Any:
    """The store at ``master`` once all hosts have come to it.

    Raises:
        RuntimeError: it cannot be opened or reached, with what a bare connection says; or who did not come.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.distributed_c10d import PrefixStore

    limit = timedelta(seconds=JOIN_SECONDS)
    try:
        store = TCPStore(master, port, num_hosts, rank == 0, timeout=limit, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        if rank == 0 and "listen" in said:
            raise RuntimeError(f"cannot listen at port {port}: {said}") from None
        raise RuntimeError(f"cannot reach {master}:{port}: {connection_fault(master, port)}") from None
    deadline = time.monotonic() + JOIN_SECONDS
    missing = list(range(num_hosts))
    try:
        store.set(f"preflight/{rank}", "here")
        while missing := [other for other in missing if not store.check([f"preflight/{other}"])]:
            if time.monotonic() > deadline:
                came = num_hosts - len(missing)
                raise RuntimeError(f"only {came} of {num_hosts} hosts came within {JOIN_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
    except dist.DistError:
        raise RuntimeError("the first host left before all had come") from None
    return PrefixStore("preflight", store)


def connection_fault(address: str, port: int) -> str:
    """What an ordinary connection meets: the store's own message does not tell a firewall from a closed port."""
    try:
        with socket.create_connection((address, port), timeout=2.0):
            return "a connection is accepted, but nobody answers: another program listens there"
    except TimeoutError:
        return "packets are dropped on the way: a firewall, or the wrong interface"
    except ConnectionRefusedError:
        return "refused: rank 0 does not listen there, or a firewall rejects it"
    except OSError as error:
        return str(error.strerror or error)


def measure(rank: int, num_hosts: int, master: str, port: int, reached: dict[str, Any]) -> None:
    """Fill ``reached``: the stage this host is at, and the figures of the stages that it has done."""
    reached["stage"] = "torch"
    import torch
    import torch.distributed as dist

    reached["stage"] = "gpu"
    for number in range(torch.cuda.device_count()):
        torch.ones(1024, device=f"cuda:{number}").sum().item()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    reached["backend"] = "nccl" if on_gpu else "gloo"
    reached["stage"] = "join"
    store = joined(rank, num_hosts, master, port)
    reached["stage"] = "group"
    limit = timedelta(seconds=JOIN_SECONDS)
    dist.init_process_group(reached["backend"], store=store, rank=rank, world_size=num_hosts, timeout=limit)
    dist.barrier()
    reached["stage"] = "links"
    reached["links"] = measure_links(Peers(device), rank, num_hosts)
    reached["stage"] = "all-reduce"
    reached["all_reduce_bytes_per_second"] = measure_all_reduce(device, num_hosts)
    dist.barrier()  # rank 0 holds the store: it leaves last
    reached["stage"] = "done"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 3 with the ``error`` of the stage, also where a library waits for ever."""
    signal.alarm(LIMIT_SECONDS + 5)  # ends it if nothing else does
    what = "How fast the hosts reach each other."
    parser = argparse.ArgumentParser(prog="launch.preflight.bandwidth", description=what)
    for name, kind in (("--rank", int), ("--hosts", int), ("--master", str), ("--port", int)):
        parser.add_argument(name, type=kind, required=True)
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    reached: dict[str, Any] = {}
    late = threading.Timer(LIMIT_SECONDS, _give_up, [reached])
    late.daemon = True
    late.start()
    try:
        measure(options.rank, options.hosts, options.master, options.port, reached)
    except Exception as error:  # of torch, gloo or NCCL: whatever it is, it is this host's answer
        reached["error"] = " ".join(str(error).split())[:500] or type(error).__name__
    late.cancel()
    print(json.dumps(reached), flush=True)
    return EXIT_ENVIRONMENT if "error" in reached else EXIT_DONE


def _give_up(reached: dict[str, Any]) -> None:
    print(json.dumps({**reached, "error": f"stood still; given up after {LIMIT_SECONDS} s in all"}), flush=True)
    os._exit(EXIT_ENVIRONMENT)


if __name__ == "__main__":
    code = main()
    os._exit(code)  # threads of gloo outlive a group that failed, and would wait for the others
