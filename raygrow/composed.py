"""What the commands do whose settings are composed from files; each is also an entry script in `jobs`.

A function's docstring is the command's help. Imports of torch and Ray wait inside the functions.
"""

from typing import Any

from raygrow.command import SETTINGS, argument, registry

COMPOSED, command = registry()
COMPOSING = (
    argument("--config-name", "a file of raygrow/conf, such as quickstart", metavar="NAME", default="train"),
    argument("--config-dir", "a folder with more files of settings", metavar="FOLDER"),
    argument("--cfg", "print the settings, do nothing", choices=("job", "hydra", "all")),
    argument("--resolve", "with --cfg: resolve references such as ${model.n_experts}", action="store_true"),
    argument("--multirun", "run every combination of comma-separated values, one after the other", action="store_true"),
)
"""Options of the commands whose settings are composed from files."""
TUNING = (argument("--config-name", "a file of raygrow/conf", metavar="NAME", default="tune"), *COMPOSING[1:])
END_TO_END = (argument("--config-name", "a file of raygrow/conf", metavar="NAME", default="pipeline"), *COMPOSING[1:])


@command(
    argument("settings", "choose a settings file (data=files) or set one value (data.path=data/mine)", **SETTINGS),
    *COMPOSING,
)
def prepare(tree: dict[str, Any]) -> int:
    """Turn text into token shards.

    Reads a corpus, trains a tokenizer (or takes a finished one), drops exact duplicates, sets documents aside for
    validation, and writes shards with a manifest to the folder `data.path`.

    Examples:
      raygrow prepare                                              Python's standard library
      raygrow prepare data.roots=site-packages data.path=data/packages             and every installed package
      raygrow prepare data=files data.files='texts/**/*.txt'       your own text, jsonl or parquet
      raygrow prepare data=dataset data.dataset=FOLDER_OR_NAME     what `datasets` loads
      raygrow prepare data=files data.files=big.parquet data.engine=ray            more than fits in memory
      raygrow prepare data=files data.files=a.jsonl data.tokenizer.path=FOLDER     with a finished tokenizer
      raygrow prepare dry_run=true                                 print all settings, do nothing
    """
    from raygrow.config import RunConfig, as_yaml, build
    from raygrow.runtime.data import prepare_data
    from raygrow.runtime.progress import progress_bars

    run: RunConfig = build(RunConfig, tree)
    if run.dry_run:
        print(as_yaml({"data": run.data}), end="")
        return 0
    with progress_bars() as progress:
        manifest = prepare_data(run.data, progress=progress)
    for name, split in manifest.splits.items():
        print(f"{run.data.path}  {name:<10} {split.documents:>9,} documents  {split.tokens:>13,} tokens")
    return 0


@command(
    argument("settings", "choose a settings file (plan=gstack) or set one value (train.seq_len=1024)", **SETTINGS),
    *COMPOSING,
)
def train(tree: dict[str, Any]) -> int:
    """Train a model by a plan.

    Trains `model` by `plan` on Ray Train and writes the run's folder, <storage_path>/<name>. Started again under the
    same name, it goes on where it stopped. Text that is not prepared yet is prepared first, as `raygrow prepare` does
    with the same data=... See docs/training.md for all settings.

    Examples:
      raygrow train --config-name quickstart                       what `make quickstart` runs; minutes on two CPU cores
      raygrow train model=decoder/llama/tiny plan=gstack           the default; hours on a CPU
      raygrow train control=true workers.num=2                     also from scratch, on two workers
      raygrow train plan.phases.stacked.growth.factor=2            stack twice instead of four times
      raygrow train plan=multistage_450m                           dense, experts, width, depth; brings its model along
      raygrow train dry_run=true                                   all settings, parameters, FLOPs, memory, phases;
                                                                   trains nothing
      raygrow train --multirun plan=gstack,scratch                 both plans, one after the other
      raygrow train --multirun train.optimizer.lr=1e-3,2e-3 'name=lr-${train.optimizer.lr}'
      ray job submit --working-dir . -- python jobs/train.py model=decoder/llama/1b workers.num=8
    """
    from raygrow.config import RunConfig, as_yaml, build

    run: RunConfig = build(RunConfig, tree)
    if run.dry_run:
        from raygrow.train.dry_run import describe
        from raygrow.train.plan import resolve

        table = describe(resolve(run.plan, run.model, run.train), run.train, workers=run.workers.num)
        print(as_yaml(run), table, sep="\n")
        return 0
    from raygrow.runtime.train import train

    return train(run)


@command(
    argument("settings", "choose a settings file (space=growth_factor) or set one value (seed=1)", **SETTINGS),
    *TUNING,
)
def tune(tree: dict[str, Any]) -> int:
    """Search when to grow, by how much, and how.

    Tries out the values that `space` names, a file of tune_spaces/ or your own, on Ray Tune. All trials of a search
    have the same final model, data and FLOPs; what trials have in common is trained once. The folder of the search,
    <storage_path>/<name>, has a report, the table of trials and the best plan. Started again under the same name, it
    goes on where it stopped.

    Examples:
      raygrow tune                                                 when to grow the tiny model
      raygrow tune space=growth_factor plan.tokens=1e8             by how much
      raygrow tune space=growth_schedule space.samples=40          learning rate, warmup, Adam's state
      raygrow tune space=growth_budget                             when, and by how much, at every budget
      raygrow tune space=my/space.yaml model=decoder/llama/small   your own file
      raygrow tune space.trial.gpus=0.25                           four trials on every GPU
      raygrow tune space.asha=null                                 every trial to its end
      raygrow tune dry_run=true                                    trials, FLOPs, and what sharing saves; trains nothing
      raygrow tune --config-name tune_quickstart                   a few minutes on two CPU cores
      ray job submit --working-dir . -- python jobs/tune.py space=growth_timing model=decoder/llama/small
    """
    from raygrow.config import build
    from raygrow.space import SpaceConfig
    from raygrow.trials import Search, describe

    if "space" not in tree:
        raise ValueError("space is missing: name a file of tune_spaces/, such as space=growth_timing")
    space: SpaceConfig = build(SpaceConfig, tree["space"], "space")
    search = Search({key: value for key, value in tree.items() if key != "space"}, space)
    if search.run.dry_run:
        print(describe(search))
        return 0
    from raygrow.runtime.tune import run_search

    return run_search(search)


@command(
    argument("settings", "choose a settings file (model=tiny) or set one value (sparsify.sparsity=0.4)", **SETTINGS),
    *END_TO_END,
)
def pipeline(tree: dict[str, Any]) -> int:
    """End to end: text, growth, evaluation, a sparse model, a server.

    Prepares the text, trains a model by a plan that stacks it and copies its MLPs into experts, evaluates it, makes it
    sparse, serves that on Ray Serve and asks it a question, which has to be answered with the tokens that the engine
    gives by itself. Each stage has its folder in <storage_path>/<name>, and one report is written at the end. Started
    again under the same name, it goes on with the first stage that is not finished.

    Examples:
      raygrow pipeline --config-name pipeline_quickstart           minutes on two CPU cores
      raygrow pipeline                                             135M parameters and their experts, for one GPU
      raygrow pipeline sparsify.sparsity=[0.4,0.5] sparsify.method=larosa serve.engine_kwargs.sparsity=0.5
      raygrow pipeline serve.keep=true serve.port=9000             goes on serving
      raygrow pipeline data=files data.files='texts/**/*.txt' name=mine
      raygrow pipeline dry_run=true                                all settings and phases; does nothing
      ray job submit --working-dir . -- python jobs/pipeline.py storage_path=/mnt/raygrow/runs
    """
    from raygrow.config import as_yaml
    from raygrow.runtime.pipeline_config import as_tree, read_pipeline

    config = read_pipeline(tree)
    if config.run.dry_run:
        from raygrow.train.dry_run import describe
        from raygrow.train.plan import resolve

        run = config.run
        table = describe(resolve(run.plan, run.model, run.train), run.train, workers=run.workers.num)
        print(as_yaml(as_tree(config)), table, sep="\n")
        return 0
    from raygrow.runtime.pipeline import run_pipeline

    return run_pipeline(config)
