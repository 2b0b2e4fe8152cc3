"""The `raygrow` command. The only file that knows Hydra: it composes a plain tree, and `config.build` takes over.

The docstring of a command's function is its help. Imports of torch and Ray wait inside the commands, so that help and
arithmetic answer at once.
"""

import argparse
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

OVERVIEW = """\
raygrow pre-trains language models by growth: train a small one, grow it, go on training.

  text      raygrow prepare                                   Python's standard library -> token shards
  train     raygrow train plan=gstack control=true            a grown model, and one from scratch beside it
  look      raygrow report runs/tiny-gstack                   loss against FLOPs, growth checks, who won
            raygrow evaluate runs/tiny-gstack --data data/python_source
            raygrow generate runs/tiny-gstack --prompt "def "
  export    raygrow export runs/tiny-gstack OUT --format hf   a folder for transformers
  by hand   raygrow grow SMALL BIG operator=gstack factor=2   grow any model folder
  plan      raygrow timing --params 7e9 --tokens 2e12         when to grow

`raygrow COMMAND --help` explains one, with examples. RAYGROW_TRACEBACK=1 shows where an error came from.
"""

GROUPS = ("model", "data", "plan", "train")
"""Folders of raygrow/conf: `plan=gstack` chooses a file there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words after `raygrow`; those of the process when not given.

    Returns:
        The exit status: 0, 1 where a run ended without success, 2 for an error that the user can mend, 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(OVERVIEW, end="")
        return 0
    composed = words[0] in ("prepare", "train") and not {"-h", "--help"} & set(words)
    parsed = _parser().parse_args(words[:1] if composed else words)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("raygrow").setLevel(logging.INFO)
    try:
        return _explained(lambda: _compose(parsed.run, words[1:]) if composed else parsed.run(parsed))
    except KeyboardInterrupt:
        return 130


def _explained(command: Callable[[], int]) -> int:
    """Runs a command; an error that people can mend becomes one paragraph and status 2."""
    try:
        return command()
    except (ValueError, OSError) as error:
        if os.environ.get("RAYGROW_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"raygrow: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raygrow", usage="raygrow COMMAND ...", description=OVERVIEW, formatter_class=_Formatter
    )
    parser.add_argument("--version", action="version", version=f"raygrow {metadata.version('raygrow')}")
    commands = parser.add_subparsers(prog="raygrow", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., int]) -> argparse.ArgumentParser:
        explained = inspect.getdoc(run) or ""
        summary = explained.partition("\n")[0].rstrip(".")
        added = commands.add_parser(name, help=summary, description=explained, formatter_class=_Formatter)
        added.set_defaults(run=run)
        return added

    def add_model(to: argparse.ArgumentParser, name: str = "model", metavar: str = "MODEL") -> None:
        to.add_argument(name, type=Path, metavar=metavar, help="model folder, or a finished run")

    def add_settings(to: argparse.ArgumentParser, text: str) -> None:
        to.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=text)

    add_settings(command("prepare", prepare), "a group's file (data=files) or one value (data.path=data/mine)")
    add_settings(command("train", train), "a group's file (plan=gstack) or one value (train.seq_len=1024)")

    added = command("grow", grow)
    add_model(added, "source", "SRC")
    added.add_argument("target", type=Path, metavar="DST", help="folder to write")
    add_settings(added, "operator=gstack and its settings")

    added = command("timing", timing)
    added.add_argument("--params", type=float, required=True, metavar="N", help="non-embedding parameters, e.g. 7e9")
    added.add_argument("--tokens", type=float, required=True, metavar="D", help="tokens of the run, e.g. 2e12")
    added.add_argument("--factor", type=int, default=4, help="how many times deeper the target is (default: 4)")

    added = command("evaluate", evaluate)
    add_model(added)
    added.add_argument("--data", type=Path, required=True, help="folder of prepared data")

    added.add_argument("--sequences", type=int, default=0, help="how many to score (default: 0, all)")

    added = command("export", export)
    add_model(added, "source", "SRC")
    added.add_argument("target", type=Path, metavar="OUT", help="folder to write")
    added.add_argument("--format", choices=("hf", "raygrow"), default="hf", help="default: hf")

    added = command("report", report)
    added.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    added.add_argument("--out", type=Path, help="folder to write to (default: the first run's)")

    added = command("generate", generate)
    add_model(added)
    added.add_argument("--prompt", default="", help="text to continue")
    added.add_argument("--tokens", type=int, default=200, help="tokens to add at most (default: 200)")
    added.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    added.add_argument("--top-p", type=float, default=0.95, help="share of likely tokens kept (default: 0.95)")
    added.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines, and leaves room for long option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=120)


def _compose(command: Callable[[dict[str, Any]], int], words: list[str]) -> int:
    """Lets Hydra compose the settings, and calls `command` with the tree: once, or for each run of `--multirun`."""
    import hydra
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    @contextmanager
    def plain_errors() -> Iterator[None]:
        try:
            yield
        except MissingMandatoryValue as error:
            raise ValueError(f"{error.full_key} is missing: it has no default, so give it a value") from error
        except OverrideParseException as error:
            raise ValueError(f"{error.override.lstrip('+')}: cannot be read as key=value; {error}") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(re.split(r"\n *(?:Config search path|full_key)", str(error))[0]) from error

    @hydra.main(version_base="1.3", config_path="pkg://raygrow.conf", config_name="train")
    def job(composed: DictConfig) -> None:
        def run() -> int:
            with plain_errors():
                tree: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            return command(tree)

        statuses.append(_explained(run))

    statuses: list[int] = []
    OmegaConf.register_new_resolver("last", lambda path: str(path).rsplit("/")[-1], replace=True)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise what is wrong instead of printing it and leaving
    sys.argv[1:] = [_settable(word) for word in words]
    with plain_errors():
        job()
    return max(statuses, default=0)


def _settable(word: str) -> str:
    """Marks `key=value` so that Hydra also takes keys which no YAML file mentions; `build` refuses unknown ones."""
    key = re.match(r"([A-Za-z_][\w.]*)=", word)
    return f"++{word}" if key and key[1] not in GROUPS else word


def prepare(tree: dict[str, Any]) -> int:
    """Turn text into token shards.

    Reads a corpus, trains a tokenizer (or takes a finished one), drops exact duplicates, sets documents aside for
    validation, and writes shards with a manifest to the folder `data.path`.

    Examples:
      raygrow prepare                                              Python's standard library
      raygrow prepare data.roots=site-packages                     and every installed package
      raygrow prepare data=files data.files='texts/**/*.txt'       your own text, jsonl or parquet
      raygrow prepare data=dataset data.dataset=FOLDER_OR_NAME     what `datasets` loads
      raygrow prepare data=files data.files=big.parquet data.engine=ray            more than fits in memory
      raygrow prepare data=files data.files=a.jsonl data.tokenizer.path=FOLDER     with a finished tokenizer
      raygrow prepare --cfg job                                    print the settings, do nothing
    """
    from raygrow.config import build
    from raygrow.data.sources import DataConfig
    from raygrow.runtime.data import prepare_data
    from raygrow.runtime.progress import progress_bar

    config: Any = build(DataConfig, tree["data"], "data")
    with progress_bar("text") as progress:
        manifest = prepare_data(config, progress=progress)
    for name, split in manifest.splits.items():
        print(f"{config.path}  {name:<10} {split.documents:>9,} documents  {split.tokens:>13,} tokens")
    return 0


def train(tree: dict[str, Any]) -> int:
    """Train a model by a plan.

    Trains `model` by `plan` on Ray Train and writes the run's folder, <storage_path>/<name>. Started again under the
    same name, it goes on where it stopped.

    Examples:
      raygrow train model=decoder/llama/tiny plan=gstack           what is trained when nothing is said
      raygrow train control=true workers.num=2                     also from scratch, on two workers
      raygrow train plan.phases.stacked.growth.factor=2            stack twice instead of four times
      raygrow train dry_run=true                                   parameters, FLOPs, memory, phases; trains nothing
      raygrow train --cfg job                                      print the settings, do nothing
      raygrow train --multirun plan=gstack,scratch                 one after the other
      raygrow train --multirun train.optimizer.lr=1e-3,2e-3 'name=lr-${train.optimizer.lr}'
      raygrow train --config-name quickstart                       what `make quickstart` runs
      ray job submit --working-dir . -- python jobs/train.py model=decoder/llama/1b workers.num=8
    """
    from raygrow.config import RunConfig, build

    run = build(RunConfig, tree)
    if run.dry_run:
        from raygrow.train.dry_run import describe
        from raygrow.train.plan import resolve

        print(describe(resolve(run.plan, run.model, run.train), run.train, workers=run.workers.most))
        return 0
    from raygrow.runtime.train import train

    return train(run)


def grow(parsed: argparse.Namespace) -> int:
    """Grow a model folder.

    Takes raygrow's model folders and Hugging Face Llamas, and writes the same kind. Works tensor by tensor: the model
    is never in memory, whatever its size.

    Examples:
      raygrow grow models/small models/big operator=gstack factor=2
    """
    import yaml

    from raygrow.config import build
    from raygrow.growth.folder import grow_folder
    from raygrow.growth.operator import GrowthConfig
    from raygrow.runtime.progress import progress_bar

    if wrong := [word for word in parsed.settings if "=" not in word]:
        raise ValueError(f"{wrong[0]!r}: expected key=value, for instance factor=2")
    settings = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in parsed.settings)}
    operator = build(GrowthConfig, settings)
    with progress_bar("growing") as progress:
        summary = grow_folder(_model_folder(parsed.source), parsed.target, operator, progress=progress)
    (blocks, grown_blocks), (parameters, grown_parameters) = summary["n_blocks"], summary["parameters"]
    print(
        f"{parsed.target}: {blocks} -> {grown_blocks} blocks, {parameters:,} -> {grown_parameters:,} parameters, "
        f"{summary['seconds']:.1f} s"
    )
    return 0


def timing(parsed: argparse.Namespace) -> int:
    """When to grow.

    How many tokens to train the base on before stacking it: log10(d) = 0.88 log10(N) + 163.27 / log10(C) - 5.74, with
    N non-embedding parameters of the final model and C = 6 N D FLOPs (arXiv 2405.15319).

    Examples:
      raygrow timing --params 7e9 --tokens 2e12
    """
    from raygrow.growth.timing import describe, growth_timing

    print(describe(growth_timing(parsed.params, parsed.tokens, factor=parsed.factor)))
    return 0


def evaluate(parsed: argparse.Namespace) -> int:
    """Loss, perplexity and bits per byte.

    Scores a model on the validation split of prepared data, and prints the result with all that is needed to get it
    again as JSON.

    Examples:
      raygrow evaluate runs/tiny-gstack --data data/python_source
      raygrow evaluate models/llama --data data/mine --sequences 100
    """
    from raygrow.evaluate.perplexity import evaluate_model
    from raygrow.runtime.progress import progress_bar

    with progress_bar("sequences") as progress:
        record = evaluate_model(_model_folder(parsed.model), parsed.data, sequences=parsed.sequences, progress=progress)
    print(record.to_json(), end="")
    return 0


def export(parsed: argparse.Namespace) -> int:
    """Write a model as a folder for other programs.

    Examples:
      raygrow export runs/tiny-gstack out --format hf       opens with transformers' AutoModelForCausalLM
      raygrow export models/llama out --format raygrow      a Hugging Face Llama as raygrow's own folder
    """
    from raygrow.weights.folder import open_folder, write_folder

    folder = open_folder(_model_folder(parsed.source))
    write_folder(
        parsed.target,
        folder.config,
        folder.tensors.items(),
        format=parsed.format,
        tokenizer_from=folder.path,
        settings=folder.settings if folder.format == parsed.format == "hf" else None,
    )
    print(parsed.target)
    return 0


def report(parsed: argparse.Namespace) -> int:
    """Loss against FLOPs, growth checks, and who won.

    Writes report.html and loss.png about one run or several, finished or not, and prints the verdict. The control of
    a run is added by itself.

    Examples:
      raygrow report runs/tiny-gstack
      raygrow report runs/factor-2 runs/factor-4 --out compared
    """
    from raygrow.report.html import write_report
    from raygrow.report.text import print_summary

    file = write_report(parsed.runs, parsed.out or parsed.runs[0])
    print_summary(parsed.runs)
    print(file)
    return 0


def generate(parsed: argparse.Namespace) -> int:
    """Continue a prompt.

    Examples:
      raygrow generate runs/tiny-gstack --prompt "def "
      raygrow generate models/llama --prompt "Once" --tokens 50 --temperature 0
    """
    from raygrow.evaluate.generate import SamplingConfig, generate_text

    sampling = SamplingConfig(
        max_new_tokens=parsed.tokens, temperature=parsed.temperature, top_p=parsed.top_p, seed=parsed.seed
    )
    print(parsed.prompt + generate_text(_model_folder(parsed.model), parsed.prompt, sampling))
    return 0


def _model_folder(path: Path) -> Path:
    """The folder itself, or the model of a finished run."""
    if not (path / "run.yaml").exists():
        return path
    if not (path / "model").exists():
        raise FileNotFoundError(f"{path}: this run has no finished model yet; start it again to go on")
    return path / "model"
