"""One process per GPU, as torchrun starts them: this process's rank and device, and how all processes agree.

When a process ends, its sockets close; the others read its reason from the store and end, too.
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
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from faults import AGAIN, Fault, Stopped

STARTING = timedelta(minutes=5)  # for all processes to meet, and for one exchange of gradients
WAITING = timedelta(days=1)  # for a process that reads bags, validates or saves; its death closes its socket
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# words in the errors of gloo, NCCL and the store when a process is lost
LOST = ("connection", "broken pipe", "socket", "timed out", "timeout", "remote")


class Processes(NamedTuple):
    """This process among all; by default the only one."""

    rank: int = 0
    world: int = 1
    local: int = 0  # rank on this machine
    control: Any = None  # gloo group

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes arrive here."""
        if self.world > 1:
            dist.barrier(self.control)

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """Run this block in one process of each machine first, then in the others."""
        if self.local != 0:
            self.wait()
        yield
        if self.local == 0:
            self.wait()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.control)
        return bool(flags)

    def mean(self, figures: Tensor) -> Tensor:
        """The mean of a CPU tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(figures, dist.ReduceOp.SUM, self.control)
        return figures / self.world

    def from_first(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with the first process's."""
        sent = tensor.detach().cpu().contiguous()
        dist.broadcast(sent, 0, self.control)
        return tensor.copy_(sent)

    def agree(self, **facts: Any) -> None:
        """Raises Fault with the names of the facts that differ between processes."""
        if self.world == 1:
            return
        digests = [hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest()[:8] for fact in facts.values()]
        mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)
        gathered = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(gathered, mine, self.control)
        differ = [
            f"{name}: differs between process {rank} and process 0 (process {self.rank} has {str(fact)[:200]}); "
            "expected the same recordings, code and kind of device on every machine"
            for i, (name, fact) in enumerate(facts.items())
            for rank, theirs in enumerate(gathered)
            if theirs[i] != gathered[0][i]
        ]
        if differ:
            raise Fault(*differ)

    def end_with(self, code: int) -> None:
        """End the finished script with an exit code other than 0."""
        if self.world == 1:
            sys.exit(code)
        if self.first:
            _write_exit_code(code)

    def gradient_group(self, device: torch.device) -> Any:
        """The process group that averages gradients."""
        return dist.new_group(timeout=STARTING, backend="nccl" if device.type == "cuda" else "gloo")


@contextmanager
def process_group() -> Iterator[Processes]:
    """Join the processes that torchrun started; if one fails, all end with its reason."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Processes()
        return
    if sys.platform == "linux":  # else the processes would outlive a killed torchrun
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    store, rank, _ = next(iter(dist.rendezvous("env://", timeout=STARTING)))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=STARTING)
    processes = Processes(rank, world, int(os.environ["LOCAL_RANK"]), dist.new_group(backend="gloo", timeout=WAITING))
    try:
        yield processes
        processes.wait()
    except Stopped:  # all processes stop at the same step
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's must not cut off the reason
        first, code, reason = _first_reason(store, rank, error)
        if code == 1:
            _write_exit_code(code)
        if first == rank and code == 1:
            raise
        print(f"error: process {rank} of {world} ends: {reason}", file=sys.stderr, flush=True)
        os._exit(code)  # a normal exit could wait forever for the lost process
    dist.destroy_process_group()


def _write_exit_code(code: int) -> None:
    """Write the exit code for the script that started torchrun: torchrun itself ends with 1 for any failure."""
    if path := os.environ.get("EXIT_CODE_FILE"):
        Path(path).write_text(str(code))


def _first_reason(store: dist.Store, rank: int, error: BaseException) -> tuple[int, int, str]:
    """The rank, exit code and reason of the process that failed first."""
    said = " ".join(str(error).split())
    code, reason = error.code if isinstance(error, Fault) else 1, f"{type(error).__name__}: {said[:500]}"
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        code, reason = AGAIN, "interrupted before its first step; run the same command again"
    elif isinstance(error, RuntimeError) and any(word in said.lower() for word in LOST):
        code, reason = AGAIN, f"lost another process ({said[:160]}); run the same command to resume"
    try:
        told = store.compare_set("reason", "", f"{rank} {code} process {rank}: {reason}").decode()
    except RuntimeError:  # the store ended with process 0
        told = f"0 {AGAIN} process 0 ended; see its output"
    first, first_code, first_reason = told.split(" ", 2)
    return int(first), int(first_code), first_reason


def choose_device(wanted: str, processes: Processes) -> torch.device:
    """The device of training.device; for torchrun the GPU of this process. Raises Fault if torch does not see it."""
    device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if processes.world > 1 and device.startswith("cuda:"):
        raise Fault(f"training.device: {wanted}, but torchrun started {processes.world} processes; set auto or cuda")
    if device == "cuda":
        device = f"cuda:{processes.local}"
    if device.startswith("cuda"):
        if not torch.cuda.is_available() or int(device[5:]) >= torch.cuda.device_count():
            raise Fault(
                f"training.device: {wanted}: process {processes.local} needs {device}, torch sees "
                f"{torch.cuda.device_count()} GPUs; set training.device=auto or cpu, start fewer processes, or install a "
                "torch for your driver"
            )
        torch.cuda.set_device(device)
    return torch.device(device)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM; a second Ctrl-C stops at once."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:  # not SIGTERM: torchrun sends it twice
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
