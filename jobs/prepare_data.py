"""Turns text into token shards: `python jobs/prepare_data.py data=python_source`, as `raygrow prepare` does."""

import sys

from raygrow.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
