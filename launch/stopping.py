"""A run that is told to stop (SIGTERM: preempted, out of time) saves first."""

import signal

import torch.distributed as dist

from launch.script import Stopped
from sharding import over_ranks


class SaveOnSigterm:
    """While it is entered, SIGTERM ends the run at its next checkpoint, which the run makes at once
    (`asked`), not in the middle of a step."""

    def __init__(self, device):
        self.device = device
        self.signalled = False  # this rank
        self.agreed = False  # any rank, known to all

    def __enter__(self):
        self.before = signal.signal(signal.SIGTERM, self.note)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)

    def note(self, *_) -> None:
        self.signalled = True

    def asked(self) -> bool:
        """Whether any rank was told to stop. Every rank must ask as often."""
        self.agreed = over_ranks([self.signalled], self.device, dist.ReduceOp.MAX) == [1]
        return self.agreed

    def obey(self, step: int) -> None:
        """To be called when the checkpoint is there. Raises Stopped."""
        if self.agreed:
            raise Stopped(
                f"stopped by SIGTERM, step {step} is saved. The same command goes on from there."
            )


def outlive_sigterm(_worker: int = 0) -> None:
    """For processes that feed a step: where all of a job's processes are told to stop, the step is
    finished with them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
