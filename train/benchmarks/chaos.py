"""Abuse that a run must survive: kills, disk faults, damage, hostile input; each promise beside how often it was tried and held.

    python train/benchmarks/chaos.py                              # minutes
    python train/benchmarks/chaos.py --kills 300 --tries 5000 --soak 20000
    python train/benchmarks/chaos.py kills disk                   # these alone

Seeded. A tiny policy is trained once as the truth. A run that was killed or damaged and is run again ends in the same weights,
log, cache and list of files, or in one Fault; hostile input in a Fault within 10 s and 1 GB. Linux, with a C compiler.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.extend(str(HERE.parent / folder) for folder in ("", "tests"))

LIBRARY = "CHAOS_DISK"  # disk.c, compiled; it must be loaded before anything else


def with_library() -> int:
    """Compile disk.c and run this command again with it. Returns the exit code."""
    if not shutil.which("cc"):
        sys.exit("error: cc: not found; expected a C compiler; apt-get install gcc libc6-dev")
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        library = f"{place}/disk.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "abuse/disk.c"], check=True)
        environment = os.environ | {"LD_PRELOAD": library, LIBRARY: library, "TMPDIR": place}
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promises", nargs="*", help="default: all")
    parser.add_argument(
        "--kills", type=int, default=20, help="of a run; other abuse of runs in proportion [%(default)s]"
    )
    parser.add_argument(
        "--tries", type=int, default=1000, help="configurations; a third of it recordings [%(default)s]"
    )
    parser.add_argument("--soak", type=int, default=2000, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if LIBRARY not in os.environ:
        sys.exit(with_library())
    from abuse import damage, inputs, runs
    from abuse.promise import Promise

    rng, place, kills = random.Random(options.seed), Path(tempfile.gettempdir()), options.kills
    # those that fork come first: a process that has computed cannot
    every: dict[str, Callable[[], Promise | Iterable[Promise]]] = {
        "kills": lambda: runs.kills(place / "kills", kills, rng, runs.SMALL),
        "kills-whole": lambda: runs.kills(place / "kills-whole", -(-kills // 10), rng, runs.WHOLE, ", judged"),
        "disk": lambda: runs.disk_faults(place / "disk", max(10, kills // 5), rng, runs.SMALL),
        "disk-whole": lambda: runs.disk_faults(place / "disk-whole", -(-kills // 50), rng, runs.WHOLE, ", judged"),
        "mirror": lambda: runs.kills_of_a_mirror(place / "mirror", -(-kills // 5), rng),
        "twice": lambda: runs.twice_at_once(place / "twice", max(3, kills // 15), rng),
        "ctrl-c": lambda: runs.interrupts(place / "ctrl-c", max(4, kills // 15), rng),
        "torchrun": lambda: runs.one_of_two_processes(place / "torchrun", max(2, kills * 2 // 15), rng),
        "soak": lambda: runs.soak(place / "soak", options.soak),
        "paths": lambda: inputs.odd_paths(place / "paths"),
        "damage": lambda: damage.damage(place / "damage", rng),
        "configurations": lambda: inputs.configurations(place / "input", options.tries, rng),
        "recordings": lambda: inputs.recordings(place / "input", options.tries // 3, rng),
    }
    if unknown := set(options.promises) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(every)}")
    tried: list[Promise] = []
    for name in options.promises or every:
        result = every[name]()
        tried += [result] if isinstance(result, Promise) else result
    print(f"{'promise':56}{'tried':>8}{'held':>8}{'broken':>8}")
    for promise in tried:
        print(f"{promise.text:56}{promise.tried:8}{promise.tried - promise.broken:8}{promise.broken:8}")
    sys.exit(any(promise.broken for promise in tried))


if __name__ == "__main__":
    main()
