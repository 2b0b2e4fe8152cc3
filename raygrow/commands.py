"""What each `raygrow` command does. A function's docstring is the command's help.

Imports of torch and Ray wait inside the functions, so that help and arithmetic answer at once.
"""

import argparse
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from raygrow.command import MODEL, SETTINGS, TARGET, argument, registry

COMMANDS, command = registry()
TOP_P = argument(
    "--top-p",
    "nucleus sampling: draw among the likeliest tokens that together have this probability",
    type=float,
    default=0.95,
)


@command(MODEL, TARGET, argument("settings", "operator=gstack and its settings; format=hf or raygrow", **SETTINGS))
def grow(parsed: argparse.Namespace) -> int:
    """Grow a model folder.

    Takes raygrow's model folders and Hugging Face's Llama, Mixtral, Qwen3 and Qwen3Moe, and writes the same kind, or
    the one that `format` names: a Llama with experts is a Mixtral, a Qwen3 with experts a Qwen3Moe. Works tensor by
    tensor: the model is never in memory, whatever its size.

    Settings of each operator (see docs/growth.md):
      gstack    factor (4)
      depth     extra_layers and source (last, middle, back, spread), or blocks; identity
      width     factor (2), or d_model, heads and d_ff; untie, noise_snr_db (10), seed
      experts   n_experts (8), top_k (2), router_std (0.02), norm_topk_prob, drop, blocks, seed

    Examples:
      raygrow grow models/small models/big operator=gstack factor=2                the whole model on top of itself
      raygrow grow models/small models/big operator=depth extra_layers=3           the last block three more times
      raygrow grow models/small models/big operator=depth extra_layers=8 source=spread identity=true
                                                                                   copies that change nothing yet
      raygrow grow models/small models/big operator=depth 'blocks=[0,1,1,2,3,3]'   every block of the new model
      raygrow grow models/small models/big operator=width factor=2                 same function, twice as wide
      raygrow grow models/small models/big operator=width d_ff=2 heads=1 d_model=1 only the MLPs
      raygrow grow models/tied models/big operator=width factor=2 untie=true       a head of its own, as transformers
                                                                                   needs it then
      raygrow grow models/llama models/mixtral operator=experts n_experts=8 top_k=2
      raygrow grow models/llama models/moe operator=experts 'blocks=[1,3]' drop=0.5 format=raygrow
    """
    from raygrow.config import build
    from raygrow.growth.folder import grow_folder
    from raygrow.growth.operator import GrowthConfig
    from raygrow.runtime.progress import progress_bars
    from raygrow.sparsity.plan import PLAN_FILE
    from raygrow.weights.folder import Format

    settings = dict(map(_setting, parsed.settings))
    format: Format | None = build(Format | None, settings.pop("format", None), "format")
    operator: GrowthConfig = build(GrowthConfig, settings)
    source = _model_folder(parsed.model)
    with progress_bars() as progress:
        summary = grow_folder(source, parsed.target, operator, format=format, progress=progress)
    (blocks, grown_blocks), (parameters, grown_parameters) = summary["n_blocks"], summary["parameters"]
    print(
        f"{parsed.target} ({summary['model_type']}): {blocks} -> {grown_blocks} blocks, "
        f"{parameters:,} -> {grown_parameters:,} parameters, {summary['seconds']:.1f} s"
    )
    if (source / PLAN_FILE).exists():
        print(
            f"{parsed.target} is dense: {PLAN_FILE} of {source} is for its own weights. For a sparse model grow the "
            "one that it was made from, then sparsify that"
        )
    return 0


@command(
    argument("--params", "non-embedding parameters of the target, e.g. 1.1e9", type=float, required=True, metavar="N"),
    argument("--tokens", "tokens of the run, e.g. 1e11", type=float, required=True, metavar="D"),
    argument("--factor", "how many times deeper than the base the target is", type=int, default=4),
)
def timing(parsed: argparse.Namespace) -> int:
    """When to grow.

    Prints how many tokens d to train the base on before stacking it: log10(d) = 0.88 log10(N) + 163.27 / log10(C) -
    5.74, with N non-embedding parameters of the final model and C = 6 N D FLOPs (arXiv 2405.15319). Fitted for N of
    0.41e9 to 3e9 and C of 8e19 to 1.2e21; outside it is extrapolated, and a base of more than 20 % of the FLOPs is
    replaced by 5 %.

    Examples:
      raygrow timing --params 1.1e9 --tokens 1e11
      raygrow timing --params 1.1e9 --tokens 1e11 --factor 2       a target twice as deep as its base
    """
    from raygrow.growth.timing import describe, growth_timing

    print(describe(growth_timing(parsed.params, parsed.tokens, factor=parsed.factor)))
    return 0


@command(
    MODEL,
    argument("--data", "folder of prepared data", type=Path, required=True),
    argument("--sequences", "sequences to score; 0 is all", type=int, default=0),
    argument(
        "--seq-len",
        "tokens per sequence (default: the run's training length, else what the model takes, 2048 at most)",
        type=int,
    ),
    argument("--sparsity", "one of the levels in the folder's sparsity.json (default: dense)", type=float),
    argument(
        "--policy",
        "decode: score the second half of each sequence, sparse; all: score every token, all sparse "
        "(default: decode with --sparsity, else all)",
        choices=("decode", "all"),
    ),
)
def evaluate(parsed: argparse.Namespace) -> int:
    """Loss, perplexity and bits per byte.

    Scores a model on the validation split of prepared data, and prints the result with all that is needed to get it
    again as JSON.

    Examples:
      raygrow evaluate runs/tiny-gstack --data data/python_source
      raygrow evaluate models/llama --data data/mine --sequences 100 --seq-len 2048
      raygrow evaluate models/sparse --data data/mine --sparsity 0.4           the second half of each sequence, sparse
      raygrow evaluate models/sparse --data data/mine --sparsity 0.4 --policy all        every token, prompts too
    """
    from raygrow.evaluate.perplexity import evaluate_model
    from raygrow.runtime.progress import progress_bars

    with progress_bars() as progress:
        record = evaluate_model(
            _model_folder(parsed.model),
            parsed.data,
            sequences=parsed.sequences,
            seq_len=_trained_seq_len(parsed.model) if parsed.seq_len is None else parsed.seq_len,
            sparsity=parsed.sparsity,
            policy=parsed.policy,
            progress=progress,
        )
    print(record.to_json(), end="")
    return 0


@command(
    MODEL,
    TARGET,
    argument("settings", "data=FOLDER and others, see above", **SETTINGS),
)
def sparsify(parsed: argparse.Namespace) -> int:
    """Make a model sparse.

    Decoding a token reads every weight of a dense model. A sparse one drops the entries of its activations that matter
    least, token by token, and the weights that these would be multiplied by are not read. This calibrates a model on
    the train split of prepared data, turns it into a basis in which little is lost, searches how much to drop where,
    and measures what it costs on the validation split: the card is README.md, the plan sparsity.json.

    Settings: data (required), sparsity (0.25, 0.4 and 0.5), method (rotated_teal, rotated_wina, grouped, larosa, teal,
    wina, topk, relu), rotation (auto, none, global, block), split (search, ratio, uniform), sequences, seq_len,
    search_sequences, evaluate_sequences, batch_size, device, speed. See docs/sparsity.md.

    Examples:
      raygrow sparsify runs/tiny-gstack models/sparse data=data/python_source
      raygrow sparsify models/llama models/sparse data=data/mine sparsity=0.4
      raygrow sparsify models/llama models/sparse data=data/mine 'sparsity=[0.4,0.5,0.75]' sequences=32 seq_len=2048
      raygrow sparsify models/llama models/larosa data=data/mine method=larosa          a basis per block, with adapters
      raygrow sparsify models/llama models/teal data=data/mine method=teal split=uniform
      raygrow sparsify models/llama models/counted data=data/mine method=rotated_wina      as many of every token
    """
    from raygrow.config import build
    from raygrow.evaluate.sparsify import sparsify_model
    from raygrow.runtime.progress import progress_bars
    from raygrow.sparsity.config import SparsifyConfig

    settings = dict(map(_setting, parsed.settings))
    if settings.pop("data", None) is None:
        raise ValueError("data is missing: name a folder of prepared data, such as data=data/python_source")
    # as it was written: 2024 and 2024-01-31 are folders too
    data = Path([word.partition("=")[2] for word in parsed.settings if word.startswith("data=")][-1])
    seq_len = {} if "seq_len" in settings else {"seq_len": _trained_seq_len(parsed.model) or 0}
    config: SparsifyConfig = build(SparsifyConfig, {**settings, **seq_len})
    with progress_bars() as progress:
        made = sparsify_model(_model_folder(parsed.model), parsed.target, data, config, progress=progress)
    dense, *levels = made.rows
    for row in levels:
        print(f"{parsed.target}  {row.told(dense)}")
    return 0


@command(MODEL, TARGET, argument("--format", "format of the folder to write", choices=("hf", "raygrow"), default="hf"))
def export(parsed: argparse.Namespace) -> int:
    """Write a model as a folder for other programs.

    In Hugging Face's format a model is a Llama or, with QK-norm, a Qwen3; with experts, a Mixtral or a Qwen3Moe. What
    none of them can hold is named.

    Examples:
      raygrow export runs/tiny-gstack out --format hf       opens with transformers' AutoModelForCausalLM
      raygrow export models/mixtral out --format raygrow    a Hugging Face model as raygrow's own folder
    """
    import shutil

    from raygrow.sparsity.card import CARD_FILE
    from raygrow.sparsity.plan import PLAN_FILE
    from raygrow.weights.atomic import new_folder
    from raygrow.weights.folder import open_folder, write_folder

    folder = open_folder(_model_folder(parsed.model))
    with new_folder(parsed.target) as aside:
        write_folder(
            aside,
            folder.config,
            folder.tensors.items(),
            format=parsed.format,
            tokenizer_from=folder.path,
            settings=folder.settings if folder.format == parsed.format == "hf" else None,
            replace=True,
        )
        sparse = (folder.path / PLAN_FILE).exists()
        for name in (PLAN_FILE, CARD_FILE) if sparse else ():
            if (folder.path / name).exists():
                shutil.copyfile(folder.path / name, aside / name)
    print(parsed.target)
    return 0


@command(
    argument("runs", "run folder, or folder of a search or a pipeline", type=Path, nargs="+", metavar="RUN"),
    argument("--out", "folder to write to; the first run's when not given", type=Path),
)
def report(parsed: argparse.Namespace) -> int:
    """Loss against FLOPs, growth checks, and who won.

    Writes report.html and loss.png about one run or several, finished or not, and prints the verdict. The control of
    a run is added by itself. Of a search it tells the best plan and writes it to best/, ready to train.

    Examples:
      raygrow report runs/tiny-gstack
      raygrow report runs/factor-2 runs/factor-4 --out compared
      raygrow report runs/growth_timing-tiny-gstack      a search: the best timing, what it saves, the formula refitted
    """
    from raygrow.report.html import write_report
    from raygrow.report.text import print_summary

    out = parsed.out or parsed.runs[0]
    file = write_report(parsed.runs, out)
    print_summary(parsed.runs, out=out)
    print(file)
    return 0


@command(
    MODEL,
    argument("--prompt", "text to continue (default: start a new document)", default=""),
    argument("--tokens", "tokens to add at most", type=int, default=200),
    argument("--temperature", "sampling temperature; 0 always takes the likeliest token", type=float, default=0.8),
    TOP_P,
    argument("--seed", "the same seed gives the same text", type=int, default=0),
)
def generate(parsed: argparse.Namespace) -> int:
    """Continue a prompt.

    Examples:
      raygrow generate runs/tiny-gstack --prompt "def "
      raygrow generate models/llama --prompt "Once" --tokens 50 --temperature 0
    """
    from raygrow.evaluate.generate import generate_text
    from raygrow.infer.sampling import Sampling

    sampling = Sampling(max_tokens=parsed.tokens, temperature=parsed.temperature, top_p=parsed.top_p, seed=parsed.seed)
    pieces = generate_text(_model_folder(parsed.model), parsed.prompt, sampling)
    first = next(pieces, "")  # before anything is printed, so that an error stands alone
    print(parsed.prompt, end=first, flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


@command(
    argument(
        "models",
        "model folders or finished runs; settings as KEY=VALUE may follow, see docs/serving.md",
        nargs="+",
        metavar="MODEL",
    ),
    argument("--name", "what clients call the model; its folder's name when not given"),
    argument("--sparsity", "one of the levels in the folder's sparsity.json (default: dense)", type=float),
    argument("--host", "where to listen; 0.0.0.0 lets other machines in", default="127.0.0.1"),
    argument("--port", "the port there", type=int, default=8000),
    argument("--yaml", "print the app as `serve deploy` takes it, start nothing", action="store_true"),
)
def serve(parsed: argparse.Namespace) -> int:
    """Serve models to OpenAI clients and browsers.

    Starts Ray Serve here, or joins the cluster of RAY_ADDRESS, and answers under /v1 like OpenAI's API; at / is a page
    to chat. Each model has an engine with a key-value cache in virtual memory, and replicas that come and go with the
    load. Ctrl-C lets answers finish, then stops. RAYGROW_API_KEY in the environment makes clients show it.

    Examples:
      raygrow serve runs/quickstart                                 http://localhost:8000, for this machine only
      raygrow serve models/llama models/mixtral --port 9000         two models, by the names of their folders
      raygrow serve runs/quickstart --name small engine_kwargs.max_num_seqs=16 engine_kwargs.dtype=float32
      raygrow serve models/sparse --sparsity 0.4                    what `raygrow sparsify` has made
      raygrow serve models/llama deployment_config.autoscaling_config.min_replicas=0
                                                                    no replica while nobody asks
      raygrow serve models/llama ingress.num_replicas=2 --yaml      a file for `serve deploy`
      ray job submit --working-dir . -- python jobs/serve.py /mnt/raygrow/models/llama --host 0.0.0.0
    """
    import os

    from raygrow.runtime.serve_config import as_yaml, read_config, serve_args

    words = [word for word in parsed.models if "=" in word]
    folders = [_named_folder(Path(word)) for word in parsed.models if "=" not in word]
    settings = {} if parsed.sparsity is None else {"engine_kwargs.sparsity": parsed.sparsity}
    args = serve_args(folders, settings | dict(map(_setting, words)), name=parsed.name)
    config = read_config(args)
    if parsed.yaml:
        print(as_yaml(args, host=parsed.host, port=parsed.port), end="")
        return 0
    from raygrow.runtime.serve import serve_models

    return serve_models(config, host=parsed.host, port=parsed.port, api_key=os.environ.get("RAYGROW_API_KEY"))


@command(
    argument("place", "a server's URL, or a model folder or finished run", metavar="URL|MODEL"),
    argument("--model", "which of a server's models; its first when not given"),
    argument("--system", "what the model is told before the conversation"),
    argument("--tokens", "tokens of an answer at most", type=int, default=512),
    argument("--temperature", "sampling temperature; 0 always takes the likeliest token", type=float, default=0.8),
    TOP_P,
    argument("--seed", "the same seed gives the same answers", type=int),
)
def chat(parsed: argparse.Namespace) -> int:
    """Talk to a model in the terminal.

    With a server (raygrow's or any that speaks OpenAI's API; RAYGROW_API_KEY in the environment is shown to it), or
    with a model that is loaded here. Ctrl-C stops an answer; /reset, /help and /quit are commands.

    Examples:
      raygrow chat localhost:8000
      raygrow chat runs/quickstart --temperature 0
    """
    import os

    from raygrow.runtime.chat import ChatConfig, Loaded, Server, chat

    config = ChatConfig(
        system=parsed.system,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        max_tokens=parsed.tokens,
        seed=parsed.seed,
    )
    url = parsed.place
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", url, re.ASCII):
        url = f"http://{url}"
    if url.startswith(("http://", "https://")):
        speaker = Server(url, model=parsed.model, api_key=os.environ.get("RAYGROW_API_KEY"))
    else:
        speaker = Loaded(_model_folder(Path(parsed.place)))
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its arrow keys)
    chat(speaker, config)
    return 0


def _setting(word: str) -> tuple[str, Any]:
    """Key and value of `key=value`."""
    import yaml

    key, equals, value = word.partition("=")
    try:
        if equals:
            return key, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise ValueError(f"{word!r}: cannot be read as key=value, for instance factor=2")


def _trained_seq_len(path: Path) -> int | None:
    """Tokens in a sequence of a run's last phase; None for a folder that is no run's."""
    from raygrow.config import from_yaml

    if not (path / "run.yaml").exists():
        return None
    run = from_yaml((path / "run.yaml").read_text())
    return list(run.plan.phases.values())[-1].seq_len or run.train.seq_len


def _named_folder(path: Path) -> tuple[str, Path]:
    """What a model is called when nobody says, and its folder."""
    return path.resolve().name, _model_folder(path).resolve()


def _model_folder(path: Path) -> Path:
    """The folder itself, or the model of a finished run."""
    from raygrow.weights.folder import finished_model

    return finished_model(path)
