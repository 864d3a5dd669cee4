"""Gloo processes that stay up for all tests: starting them takes most of the time."""

import pickle
import queue
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Pairs by rank: as many on each, and not.
EVEN = {1: (48,), 2: (24, 24), 4: (12, 12, 12, 12)}
UNEVEN = {2: (31, 17), 4: (20, 0, 27, 1)}

SECONDS = 60  # that a test may take before the processes are taken for stuck
SECONDS_TO_START = 300  # on a busy machine, where each imports torch
SECONDS_AFTER_ERROR = 5  # for which one rank may wait for another that has failed


class Processes:
    def __init__(self, world_size, folder):
        self.world_size, self.folder, self.tasks = world_size, folder, 0
        self.start()

    def start(self):
        context = mp.get_context("spawn")
        self.inboxes = [context.SimpleQueue() for _ in range(self.world_size)]
        self.results = context.Queue()
        path = self.folder / f"store{self.tasks}"
        self.processes = [
            context.Process(
                target=_serve, args=(rank, self.world_size, path, inbox, self.results), daemon=True
            )
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()
        for _ in self.processes:
            self.results.get(timeout=SECONDS_TO_START)

    def run(self, world_size, function, *args):
        """``function(group, *args)`` of the first ``world_size`` processes -> results by rank.
        An error of a rank is raised here; processes that are stuck are replaced."""
        self.tasks += 1
        for inbox in self.inboxes[:world_size]:
            inbox.put(pickle.dumps((world_size, function, args)))
        results, errors, stuck = {}, [], False
        while len(results) < world_size and not stuck:
            try:
                timeout = SECONDS_AFTER_ERROR if errors else SECONDS
                rank, result, error = self.results.get(timeout=timeout)
            except queue.Empty:
                stuck = True
            else:
                results[rank] = result
                errors += [f"rank {rank}: {error}"] if error else []
        if stuck:
            for process in self.processes:
                process.kill()
            self.start()
        waiting = sorted(set(range(world_size)) - results.keys())
        assert not (errors or stuck), "\n".join([*errors, f"ranks without an answer: {waiting}"])
        return [pickle.loads(results[rank]) for rank in range(world_size)]

    def stop(self):
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(SECONDS)
            process.kill()


def _serve(rank, world_size, path, inbox, results):
    torch.set_num_threads(1)
    # As the fixture of conftest.py: unwritten memory is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=SECONDS_TO_START),
    )  # fmt: skip
    groups = {n: dist.new_group(range(n)) for n in range(1, world_size + 1)}
    results.put(rank)  # it is there
    while (task := inbox.get()) is not None:
        n, function, args = pickle.loads(task)
        torch.manual_seed(rank)
        try:
            results.put((rank, pickle.dumps(function(groups[n], *args)), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


def error_of(group, call):
    try:
        call(group)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None
