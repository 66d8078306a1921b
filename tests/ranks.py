"""`torchrun ... tests/ranks.py FILE` trains as a JSON file says, in one group of ranks: once for each list of flags in
`runs`, with the `fault`, if any, [rank, moment, n, what]: at the n-th moment of that rank (-1: of each) `what` happens.

Moments: a `training` or `evaluation` pass, the `reading` of a row, a `saving`. What: a signal to the rank, as in
`TERM`, or to torchrun, as in `parent TERM`; or `nan` (the loss), `memory` (which runs out), `damage` (to a frame).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import train_vqa as vqa


def arrange(rank: int, moment: str, count: int, what: str) -> None:
    """Have the fault happen in this process, if it is meant."""
    seen = []
    if rank not in (-1, int(os.environ["RANK"])):
        return

    def is_due() -> bool:
        seen.append(moment)
        if len(seen) != count:
            return False
        if what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if what not in ("nan", "damage"):
            os.kill(os.getppid() if "parent" in what else os.getpid(), getattr(signal, f"SIG{what.split()[-1]}"))
        return True

    forward, read, save = vqa.SurgicalVQAModel.forward, vqa.SurgicalVQADataset.__getitem__, torch.save

    def watched_forward(self, *args, **kwargs):
        spoilt = self.training == (moment == "training") and is_due() and what == "nan"
        outputs = forward(self, *args, **kwargs)
        if spoilt:
            outputs.loss = outputs.loss * torch.nan
        return outputs

    def watched_read(self, index):
        if is_due():
            self.rows[index].frame_paths[0].write_bytes(b"no image")
        return read(self, index)

    if moment == "reading":
        vqa.SurgicalVQADataset.__getitem__ = watched_read
    elif moment == "saving":
        torch.save = lambda *args, **kwargs: (is_due(), save(*args, **kwargs))[1]
    else:
        vqa.SurgicalVQAModel.forward = watched_forward


def train_all() -> int:
    """The highest exit status of the trainings."""
    work = json.loads(Path(sys.argv[1]).read_text())
    if "fault" in work:
        arrange(*work["fault"])
    return max(vqa.main(flags) for flags in work["runs"])


if __name__ == "__main__":
    vqa.run(train_all)
