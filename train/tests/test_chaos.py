"""A run that is killed twenty times, and one whose disk fails ten times, by the bench that can do it for hours."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "benchmarks/chaos.py"


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler; apt-get install gcc libc6-dev")
def test_kills_and_disk_faults_lose_and_change_nothing() -> None:
    command = [sys.executable, str(BENCH), "kills", "disk", "--kills", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    tried = [int(line.split()[-3]) for line in done.stdout.splitlines()[1:]]
    assert tried[0] >= 20 and tried[1] == 10, done.stdout
