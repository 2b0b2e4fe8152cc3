"""The end-to-end pipeline, from text to a served sparse model: `python jobs/pipeline.py`, like `raygrow pipeline`."""

import sys

from raygrow.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
