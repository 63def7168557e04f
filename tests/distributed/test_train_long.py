"""examples/train_long.py: the losses do not depend on the number of processes, nor on a rank that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import example_jobs
import pytest
import torch
from processes import Team

pytest.importorskip("rich", reason="pip install -e .[examples]")

SIZES = ("--length", "200")
#: Seconds that a process has to do what a free machine does in 10 s.
PATIENCE = 400.0


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    with Team(3, tmp_path_factory.mktemp("team") / "store") as team:
        yield team


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of so many steps in a dtype on one process."""
    with Team(1, tmp_path_factory.mktemp("alone") / "store") as one:
        output = str(tmp_path_factory.mktemp("output"))
        arguments = (*SIZES, "--output", output, "--steps")
        yield lambda dtype, steps: one.run(example_jobs.train_long, dtype, *arguments, str(steps))[0]


def test_resume_on_another_number_of_processes(team, alone, tmp_path: Path) -> None:
    arguments = (*SIZES, "--output", str(tmp_path))
    with Team(2, tmp_path / "store") as two:
        two.run(example_jobs.train_long, torch.float64, *arguments, "--steps", "3")
    whole = alone(torch.float64, 6)
    assert whole[5] < whole[0]
    for losses in team.run(example_jobs.train_long, torch.float64, *arguments, "--steps", "6", "--resume"):
        assert losses == pytest.approx(whole, rel=1e-9)


def test_nothing_is_lost_when_a_rank_is_killed(team, alone, tmp_path: Path) -> None:
    """The run of torchrun ends with an error. Its checkpoint goes on, as if nobody had been killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(example_jobs.EXAMPLES / "train_long.py"), *SIZES, "--output", str(tmp_path), "--save-every", "1"]
    log, checkpoint = tmp_path / "log", tmp_path / "long.pt"
    with log.open("w") as file:
        run = subprocess.Popen([*command, *script, "--steps", "1000000"], stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + PATIENCE
            while not checkpoint.exists():
                assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.05)
            ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            assert len(ranks) == 2
            os.kill(int(ranks[1]), signal.SIGKILL)
            assert run.wait(PATIENCE) != 0, "torchrun ended without an error"
        finally:
            run.terminate()  # torchrun ends its ranks
            run.wait(PATIENCE)
    done = len(torch.load(checkpoint)["losses"])
    resumed = (*SIZES, "--output", str(tmp_path), "--steps", str(done + 2), "--resume")
    whole = alone(torch.float32, done + 2)
    for losses in team.run(example_jobs.train_long, torch.float32, *resumed):
        assert losses == pytest.approx(whole, rel=1e-4)
