"""`torchrun ... tests/ranks.py FILE` trains once for each list of flags in a JSON file, all in one group of ranks."""

import json
import sys
from pathlib import Path

import train_vqa as vqa


def train_all() -> int:
    """The highest exit status of the trainings."""
    return max(vqa.main(flags) for flags in json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    vqa.run(train_all)
