"""Recordings and prunings that are killed at any moment go on and end with the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("work", ["record", "prune"])
def test_runs_killed_at_random_end_with_the_same_bytes(work, tmp_path, request):
    n_kills = 100 if request.config.getoption("--all-families", default=False) else 3
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), work, str(tmp_path), str(n_kills), "0"]
    limit = 300 + 20 * n_kills
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= n_kills
    assert found["unequal"] == found["failed"] == 0, done.stderr
    assert found["equal"] >= 1
