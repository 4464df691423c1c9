"""Train in child processes that are killed (SIGKILL) at random moments, and compare with a run that is not.

    python -P tests/support/killed_training.py STORE FOLDER KILLS SEED '{"steps": 60, ...}'

A run is started again until it ends; then the next one begins, until so many children were killed. Prints the number of
runs, and fails where one run's crosscoders differ in a byte from those of the uninterrupted one, or where a child ended
badly. This process has torch loaded and one thread, so that a child is a fork and costs milliseconds.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastdiff.config import TrainConfig
from fastdiff.crosscoder.train import train_seeds
from fastdiff.rundir import sha256_file


def child(store: Path, run: Path, config: TrainConfig) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train_seeds(store, run, config)
            code = 0
        finally:
            os._exit(code)
    return pid


def hashes(run: Path) -> dict[str, str]:
    names = ("model.safetensors", "config.json")
    return {str(p.relative_to(run)): sha256_file(p) for n in names for p in sorted(run.glob(f"crosscoder/seed-*/{n}"))}


def main() -> None:
    store, folder, kills, seed, options = sys.argv[1:]
    torch.set_num_threads(1)
    config = TrainConfig(**json.loads(options))
    rng = random.Random(int(seed))
    whole = Path(folder) / "whole"
    began = time.monotonic()
    if os.waitpid(child(Path(store), whole, config), 0)[1] != 0:
        raise SystemExit("the uninterrupted run failed")
    seconds = time.monotonic() - began
    wanted, killed, runs = hashes(whole), 0, 0
    while killed < int(kills):
        run = Path(folder) / f"run-{runs}"
        while True:
            pid = child(Path(store), run, config)
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if status == 0:
                break
            if not os.WIFSIGNALED(status):
                raise SystemExit(f"run {runs} failed after {killed} kills")
            killed += 1
        if hashes(run) != wanted:
            raise SystemExit(f"run {runs} differs from the uninterrupted one after {killed} kills")
        runs += 1
    print(json.dumps({"runs": runs, "killed": killed, "seconds_of_a_run": round(seconds, 3)}))  # noqa: T201 (a script)


if __name__ == "__main__":
    main()
