"""Gloo processes that stay up for the tests of a module: starting them takes most of the time."""

import pickle
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60  # that a test may take before the processes are taken for stuck


class Processes:
    def __init__(self, world_size, path):
        context = mp.get_context("spawn")
        self.inboxes = [context.SimpleQueue() for _ in range(world_size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(
                target=_serve, args=(rank, world_size, path, inbox, self.results), daemon=True
            )
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()

    def run(self, world_size, function, *args):
        """``function(group, *args)`` of the first ``world_size`` processes -> results by rank.
        An error of a rank is raised here."""
        for inbox in self.inboxes[:world_size]:
            inbox.put(pickle.dumps((world_size, function, args)))
        answers = [self.results.get(timeout=SECONDS) for _ in range(world_size)]
        for rank, _, error in sorted(answers):
            assert error is None, f"rank {rank}: {error}"
        return [pickle.loads(result) for _, result, _ in sorted(answers)]

    def stop(self):
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(SECONDS)
            process.kill()


def _serve(rank, world_size, path, inbox, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    groups = {n: dist.new_group(range(n)) for n in range(1, world_size + 1)}
    while (task := inbox.get()) is not None:
        n, function, args = pickle.loads(task)
        torch.manual_seed(rank)
        try:
            results.put((rank, pickle.dumps(function(groups[n], *args)), None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()
