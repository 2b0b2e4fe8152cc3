"""Serves models on the cluster: `python jobs/serve.py /mnt/raygrow/models/llama`, as `raygrow serve` does."""

import sys

from raygrow.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
