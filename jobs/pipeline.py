"""The whole way from text to a served sparse model: `python jobs/pipeline.py`, as `raygrow pipeline` does."""

import sys

from raygrow.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
