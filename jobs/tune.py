"""Searches when and how to grow: `python jobs/tune.py space=growth_timing`, as `raygrow tune` does."""

import sys

from raygrow.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
