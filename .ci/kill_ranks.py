"""Kill a rank of a training job at random moments: the job ends, no checkpoint is lost, and a resumed run goes on.

    python .ci/kill_ranks.py                      # ten times, some minutes on two CPU cores; Linux
    python .ci/kill_ranks.py --times 3 --seed 7   # other moments

One run of train.py, tiny preset, lives through all rounds in a scratch folder, and saves after each step. In a round
torchrun starts it on two ranks, or resumes it; one of them gets SIGKILL while processes start, in a step, or while a
checkpoint is written. Then the job must end within 30 s, with a line that says why; the checkpoint must be whole, and
not older than the one that was there before; and --resume must go on, on one process and on two in turn, and leave
nothing that is half written. At the end one process trains as many steps without a kill: its losses are the same.
Prints a line a round and one of JSON; exit status 1 if something does not hold.
"""
import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import sample

RANKS = 2
PARALLEL = ("dp=2", "ep=2", "cp=2")    # in turn
MOMENTS = ("start", "step", "save", "save")  # when a rank is killed, in turn
STEPS = 100_000                        # more than all rounds make
GO_ON = 3                              # steps of a resumed run
END_S = 30                             # in which a job must end once a rank is killed
WAIT_S = 180                           # given to what should take seconds
NEAR = 0.01                            # of a loss: ranks add in another order, and routers choose by what they added
CAUSES = "another rank has ended|other ranks are still waited for|SIGKILL"

class Broken(Exception):
    """What should hold does not."""

def check(holds, words):
    if not holds:
        raise Broken(words)

# ---- the job -------------------------------------------------------------------------------------

class Job:
    """train.py in a process, or under torchrun in several; its lines are read as they come."""

    def __init__(self, folder, ranks, parallel, *flags):
        command = [sys.executable, "train.py"]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [sys.executable, *torchrun, "train.py", "--parallel", parallel]
        command += ["--out", str(folder), "--device", "cpu", "--log-every", "1", "--eval-every", "1", *flags]
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=HERE, env=environ, **pipe)
        self.lines = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def text(self):
        return "".join(self.lines)

    def wait(self, seconds):
        """-> exit status; Broken, and the job is killed, if it has not ended then."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            raise Broken(f"the job had not ended after {seconds:.0f} s") from None
        self.reader.join(10)
        return status

    def stop(self):
        """Kill all its processes."""
        for pid in [*self.ranks().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ranks(self):
        """Processes that torchrun has started -> rank: its pid."""
        found = {}
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            for pid in children.split():
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(pid)
        return found

def wait_until(job, is_true):
    """Until something is true of a running job."""
    end = time.monotonic() + WAIT_S
    while not is_true():
        check(job.process.poll() is None, f"the job ended by itself:\n{job.text()[-2000:]}")
        check(time.monotonic() < end, f"the job does not get on:\n{job.text()[-2000:]}")
        time.sleep(0.0005)

# ---- the checkpoint ------------------------------------------------------------------------------

def half_written(folder):
    return [*folder.glob("*.tmp")]

def read_whole(folder):
    """The step of the folder's checkpoint, 0 where there is none. Broken if any part of it is damaged."""
    path = folder / "ckpt.pt"
    if not path.exists():
        return 0
    with zipfile.ZipFile(path) as parts:
        damaged = parts.testzip()      # each part's checksum
    check(damaged is None, f"{path.name}: {damaged} is damaged")
    state = sample.load_checkpoint(str(folder))
    sample.check_finite(state["model"])
    return state["now"]["step"]

def losses(folder):
    """Step -> loss, as the log says; of a step that was made twice the last one."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}

# ---- a round -------------------------------------------------------------------------------------

def kill_at(job, moment, folder, rng):
    """Kill one of the job's ranks, at random -> the rank, the checkpoint's step before it, when."""
    wait_until(job, lambda: len(job.ranks()) == RANKS)
    first = len(job.lines)
    if moment == "start":
        time.sleep(rng.uniform(0, 4))
    else:
        wait_until(job, lambda: any(line.startswith("step ") for line in job.lines[first:]))
        time.sleep(rng.uniform(0, 2))
    before = read_whole(folder)
    rank = rng.randrange(RANKS)
    pid = job.ranks()[rank]
    if moment == "save":
        wait_until(job, lambda: half_written(folder))
        time.sleep(rng.uniform(0, 0.005))
    os.kill(pid, signal.SIGKILL)
    return rank, before, time.monotonic()

def play_round(number, folder, start, rng):
    """Kill a rank, and go on -> what a line of the table says."""
    moment = MOMENTS[number % len(MOMENTS)]
    parallel = PARALLEL[number % len(PARALLEL)]
    begin = ["--resume"] if read_whole(folder) else start
    job = Job(folder, RANKS, parallel, *begin)
    try:
        rank, before, killed = kill_at(job, moment, folder, rng)
        status = job.wait(END_S)
        ended = time.monotonic() - killed
    finally:
        job.stop()
    check(status == 1, f"exit status {status}")
    cause = re.search(f".*({CAUSES}).*", job.text())
    check(cause, f"no line says why:\n{job.text()[-2000:]}")

    left = len(half_written(folder))
    step = read_whole(folder)
    check(step >= before, f"the checkpoint went back from step {before} to {step}")

    ranks = 1 + number % 2
    begin = ["--resume", "--stop-after", str(step + GO_ON)] if step else [*start, "--stop-after", str(GO_ON)]
    resumed = Job(folder, ranks, parallel, *begin)
    try:
        status = resumed.wait(WAIT_S)
    finally:
        resumed.stop()
    check(status == 0, f"--resume on {ranks}: exit status {status}\n{resumed.text()[-2000:]}")
    check(read_whole(folder) == step + GO_ON, f"--resume ended at step {read_whole(folder)}")
    check(not half_written(folder), "something half written is left after --resume")
    return dict(moment=moment, parallel=parallel, rank=rank, ended=ended, before=before, step=step, left=left,
                resumed_on=ranks, cause=cause[1])

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--times", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.py"
        text.write_bytes((HERE / "msa.py").read_bytes()[:30_000])
        sizes = "--vocab-size 300 --seq-len 64 --batch-size 4".split()
        start = ["--data", str(text), "--steps", str(STEPS), *sizes]
        folder = Path(scratch) / "out"
        rounds = []
        broken = []
        print(" no | killed in | mesh | rank | ended s | step before, after | half written | resumed on | cause")
        for number in range(args.times):
            try:
                row = play_round(number, folder, start, rng)
            except Broken as error:
                broken.append(f"round {number}: {error}")
                print(f"{number:3} | {error}", flush=True)
                continue
            rounds.append(row)
            print(f"{number:3} | {row['moment']:9} | {row['parallel']} | {row['rank']:4} | {row['ended']:7.1f} | "
                  f"{row['before']:11}, {row['step']:5} | {row['left']:12} | {row['resumed_on']:10} | {row['cause']}",
                  flush=True)

        # what came of it is what one process learns undisturbed
        farthest = None
        last = read_whole(folder)
        if last:
            alone = Path(scratch) / "alone"
            job = Job(alone, 1, None, *start, "--stop-after", str(last))
            job.wait(20 * WAIT_S)
            want, got = losses(alone), losses(folder)
            farthest = max(abs(got[step] / want[step] - 1) for step in want)
            print(f"losses  | {len(got)} steps, of one process's {len(want)}; farthest {farthest:.1e}")
            if got.keys() != want.keys() or farthest > NEAR:
                broken.append(f"losses: {len(got)} steps of {len(want)}, {farthest:.1e} from one process's")

    slowest = max((row["ended"] for row in rounds), default=None)
    in_saves = sum(row["left"] > 0 for row in rounds)
    print(json.dumps(dict(
        times=args.times, held=len(rounds), in_a_save=in_saves, slowest_end_s=slowest, steps=last,
        farthest_loss=farthest, broken=broken)))
    sys.exit(1 if broken else 0)

if __name__ == "__main__":
    main()
