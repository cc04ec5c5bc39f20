"""One process for each GPU, as torchrun starts them: who this process is, and what all of them agree on.

A process that ends takes the others with it: its sockets close, they learn its reason from the store, and end too.
Without torchrun there is one process, and nothing here communicates.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from faults import AGAIN, Fault, Stopped

STARTING = timedelta(minutes=5)  # until all processes have met; also a hanging exchange of gradients
WAITING = timedelta(days=1)  # for one that reads bags, validates or saves: if it dies, its closed socket tells
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# in what gloo, NCCL and the store raise
LOST = ("connection", "broken pipe", "socket", "timed out", "timeout", "remote")


class Processes(NamedTuple):
    """This process among all of them; the defaults are those of a process alone."""

    rank: int = 0
    world: int = 1
    local: int = 0  # on this machine
    control: Any = None  # the gloo group over which all agree

    @property
    def first(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier(self.control)

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """One process of each machine does what is inside first; the others do it after."""
        if self.local != 0:
            self.wait()
        yield
        if self.local == 0:
            self.wait()

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of them at least."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.control)
        return bool(flags)

    def mean(self, figures: Tensor) -> Tensor:
        """The mean over all of them of figures on the CPU."""
        if self.world > 1:
            dist.all_reduce(figures, dist.ReduceOp.SUM, self.control)
        return figures / self.world

    def from_first(self, tensor: Tensor) -> Tensor:
        """Fill a tensor with what the first process has in its own."""
        sent = tensor.detach().cpu().contiguous()
        dist.broadcast(sent, 0, self.control)
        return tensor.copy_(sent)

    def agree(self, **facts: Any) -> None:
        """Raises Fault with the names of what is not the same in all of them."""
        if self.world == 1:
            return
        digests = [hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest()[:8] for fact in facts.values()]
        mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)
        all_ = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_, mine, self.control)
        differ = [
            f"{name}: not the same in process {rank} as in process 0 (here, in process {self.rank}: {str(fact)[:200]}); "
            "expected the same recordings, code and kind of device on every machine"
            for i, (name, fact) in enumerate(facts.items())
            for rank, theirs in enumerate(all_)
            if theirs[i] != all_[0][i]
        ]
        if differ:
            raise Fault(*differ)

    def end_with(self, code: int) -> None:
        """End a script that has done its work, but with something to say by its exit code."""
        if self.world == 1:
            sys.exit(code)
        if self.first:
            _tell(code)

    def gradients(self, device: torch.device) -> Any:
        """The group that averages gradients on this device."""
        return dist.new_group(timeout=STARTING, backend="nccl" if device.type == "cuda" else "gloo")


@contextmanager
def process_group() -> Iterator[Processes]:
    """Meet the other processes that torchrun started, and end with them, whichever fails and for what reason."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Processes()
        return
    if sys.platform == "linux":  # torchrun gives each a session of its own: killed, it would leave them to train on
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    store, rank, _ = next(iter(dist.rendezvous("env://", timeout=STARTING)))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=STARTING)
    ranks = Processes(rank, world, int(os.environ["LOCAL_RANK"]), dist.new_group(backend="gloo", timeout=WAITING))
    try:
        yield ranks
        ranks.wait()
    except Stopped:  # all of them at the same step
        raise
    except BaseException as error:
        first, code, reason = _first_reason(store, rank, error)
        if code == 1:
            _tell(code)
        if first == rank and code == 1:
            raise
        print(f"error: process {rank} of {world} ends: {reason}", file=sys.stderr, flush=True)
        os._exit(code)  # an orderly end could wait for ever for the process that is gone
    dist.destroy_process_group()


def _tell(code: int) -> None:
    """Leave the exit code to who started torchrun, which takes any but 0 for a failure, and then ends with 1."""
    if path := os.environ.get("EXIT_CODE_FILE"):
        Path(path).write_text(str(code))


def _first_reason(store: dist.Store, rank: int, error: BaseException) -> tuple[int, int, str]:
    """Which process ended first, with what exit code and for what reason."""
    said = " ".join(str(error).split())
    mine = f"{rank} {error.code if isinstance(error, Fault) else 1} process {rank} failed, {type(error).__name__}: {said[:500]}"
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        mine = f"{rank} {AGAIN} process {rank} was interrupted before its first step; run the same command again"
    elif isinstance(error, RuntimeError) and any(word in said.lower() for word in LOST):
        mine = (
            f"{rank} {AGAIN} another process is gone without a word ({said[:160]}); the same command goes on from "
            "the last checkpoint"
        )
    try:
        told = store.compare_set("reason", "", mine).decode()
    except RuntimeError:  # the store went with the process that kept it
        told = f"0 {AGAIN} process 0 is gone; what it printed says why"
    first, code, reason = told.split(" ", 2)
    return int(first), int(code), reason
