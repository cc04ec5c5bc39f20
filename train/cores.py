"""How many cores this process may use: by its affinity, and by the CPU quota of its container (cgroup v2, cpu.max)."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds, or max; period


def usable_cores() -> int:
    """At least one."""
    allowed = len(os.sched_getaffinity(0))
    quota, period = QUOTA.read_text().split() if QUOTA.exists() else ("max", "100000")
    return allowed if quota == "max" else max(1, min(allowed, round(int(quota) / int(period))))
