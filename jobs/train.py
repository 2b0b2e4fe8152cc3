"""Trains a model by a plan: `python jobs/train.py model=decoder/llama/tiny plan=gstack`, as `raygrow train` does."""

import sys

from raygrow.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
