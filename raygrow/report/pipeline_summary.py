"""What the report of a pipeline says, and its figure of what sparsity costs."""

import math
import shlex
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from raygrow.report import plots, units
from raygrow.report.pipeline import Level, Pipeline
from raygrow.report.plots import GROWN, Drawing
from raygrow.report.summary import Summary, summarize
from raygrow.report.tables import Table, flatten, without_empty_columns

POLICIES = {"decode": "prompts dense", "all": "every token sparse"}


def summarize_pipeline(pipeline: Pipeline) -> Summary:
    """The verdict and the tables of a pipeline, finished or not."""
    trained = summarize(pipeline.runs) if pipeline.runs else None
    said = pipeline.stage("serve").gave
    own = [stages_table(pipeline), sparsity_table(pipeline), serving_table(pipeline)]
    tables = [*own, *(trained.tables if trained else [])]
    done = sum(stage.status == "finished" for stage in pipeline.stages)
    if done == len(pipeline.stages):
        headline, outcome = "From text to a served sparse model", "won"
    elif said and not said["same"]:
        headline, outcome = "The server answers otherwise than the engine", "lost"
    else:
        following = next(stage.name for stage in pipeline.stages if stage.status != "finished")
        headline, outcome = f"{done} of {len(pipeline.stages)} stages finished, next is {following}", "open"
    return Summary(
        title=pipeline.name,
        headline=headline,
        outcome=outcome,
        sentences=[
            *_trained_sentences(pipeline),
            *(trained.sentences if trained and trained.outcome != "open" else []),
            *_sparse_sentences(pipeline),
            *_served_sentences(pipeline),
        ],
        tables=[table for table in tables if table.rows],
        settings=_settings_table(pipeline),
        commands=_commands(pipeline) if outcome == "won" else [],
        next="Use the model",
    )


def pipeline_panels(pipeline: Pipeline) -> dict[str, Drawing]:
    """The panels that the pipeline has data for, by name."""
    found = plots.panels([run for run in pipeline.runs if run.history])
    if len(pipeline.levels) > 1 and pipeline.levels[0].scores:
        found["draw_sparsity"] = partial(draw_sparsity, levels=pipeline.levels)
    return found


def draw_sparsity(axes: Axes, levels: Sequence[Level]) -> None:
    """The rise of the perplexity over the share of the weights that is skipped."""
    dense, *sparse = levels
    for color, (policy, label) in zip(GROWN, POLICIES.items(), strict=False):
        points = [(0.0, 0.0)]
        points += [(level.skipped, rise) for level in sparse if (rise := _rise(level, dense, policy)) is not None]
        points.sort()
        axes.plot(*zip(*points, strict=True), "-o", color=color, markersize=4, label=label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set(title="What sparsity costs", xlabel="weights of the blocks not read", ylabel="rise of the perplexity")
    axes.legend(loc="upper left")


def stages_table(pipeline: Pipeline) -> Table:
    """One row per stage: its time and FLOPs."""
    flops = sum(stage.flops or 0.0 for stage in pipeline.stages)
    rows = [
        [
            stage.name,
            stage.status,
            str(stage.starts or units.DASH),
            units.duration(stage.seconds),
            units.flops(stage.flops or None),
            units.percent(stage.flops / flops if stage.flops else None),
        ]
        for stage in pipeline.stages
    ]
    header = ["stage", "status", "starts", "time", "FLOPs", "share"]
    note = (
        "Time is that of the whole stage, the start of its processes included; that of a start that was killed is not "
        "counted. FLOPs of training count forward and backward passes, the control's included; those of other "
        "stages the tokens that went through the model, as if it were dense. The few tokens of the server are not "
        "counted."
    )
    return Table(title="Stages", header=header, rows=rows, note=note)


def sparsity_table(pipeline: Pipeline) -> Table:
    """The dense model and every level of the sparse one, on the validation text."""
    dense, rows = pipeline.levels[0], []
    for level in pipeline.levels:
        if not level.scores:
            continue
        decode, every = ([_perplexity(level, policy), _told_rise(level, dense, policy)] for policy in POLICIES)
        bits = level.scores.get("all", {}).get("bits_per_byte")
        rows.append(
            [
                "dense" if level.sparsity is None else f"{level.sparsity:g}",
                units.percent(None if level.sparsity is None else level.nominal),
                units.percent(None if level.sparsity is None else level.skipped),
                *decode,
                *every,
                units.number(bits),
            ]
        )
    header = ["sparsity", "nominal", "skipped", "perplexity", "rise", "all sparse", "rise", "bits/byte"]
    scored = next((record for level in pipeline.levels for record in level.scores.values()), None)
    note = ""
    if scored:
        made = f"Method {pipeline.plan['method']}, rotation {pipeline.plan['rotation']}. " if pipeline.plan else ""
        note = (
            f"{made}On {scored['sequences']:,} sequences of {scored['seq_len']} tokens of the validation text. Nominal "
            "is the share of the blocks' weights that a token does not multiply by, skipped what is saved of reading "
            "them. Perplexity is as the model is served: the first half of each sequence is a prompt and dense, the "
            "second half is sparse and counts. All sparse has every token sparse, and all count, as they do for bits "
            "per byte."
        )
    return without_empty_columns(Table(title="Sparsity", header=header, rows=rows, note=note))


def serving_table(pipeline: Pipeline) -> Table:
    """What the server was asked, and what it said."""
    gave = pipeline.stage("serve").gave
    if not gave:
        return Table(title="Serving", header=["", ""], rows=[])
    rows = [
        ["same tokens as the offline engine", "passed" if gave["same"] else "FAILED"],
        ["sparsity", f"{gave['sparsity']:g}"],
        ["prompt", repr(gave["prompt"])],
        ["answer", repr(gave["answer"])],
        *([] if gave["same"] else [["offline", repr(gave["offline"])]]),
        ["tokens", f"{gave['tokens']}, finish_reason {gave['finish_reason']}"],
        ["seconds, the first request's", units.number(gave["seconds"], 2)],
    ]
    return Table(title="Serving", header=["check", "result"], rows=rows, words=True)


def _perplexity(level: Level, policy: str) -> str:
    loss = level.loss(policy)
    return units.number(None if loss is None else math.exp(min(loss, 700.0)))  # beyond, a float overflows


def _rise(level: Level, dense: Level, policy: str) -> float | None:
    """By what share the perplexity is above that of the dense model."""
    loss, before = level.loss(policy), dense.loss(policy)
    return None if loss is None or before is None else math.expm1(min(loss - before, 700.0))


def _told_rise(level: Level, dense: Level, policy: str) -> str:
    return units.percent(None if level is dense else _rise(level, dense, policy), signed=True)


def _trained_sentences(pipeline: Pipeline) -> list[str]:
    run = next(iter(pipeline.runs), None)
    if run is None or run.status != "finished":
        return [f"Training failed: {run.summary.get('reason')}"] if run and run.status == "failed" else []
    last = run.phases[-1]
    active = f" ({units.count(last.active_parameters)} for a token)" if last.active_parameters else ""
    return [
        f"{units.count(last.parameters)} parameters{active}, grown in {len(run.growths)} steps on "
        f"{units.count(run.last('tokens'))} tokens and {units.flops(run.last('flops'))} FLOPs, came to "
        f"{units.number(run.last('val_loss'))} nats per token of validation text, "
        f"{units.number(run.last('val_bits_per_byte'))} bits per byte."
    ]


def _sparse_sentences(pipeline: Pipeline) -> list[str]:
    if len(pipeline.levels) < 2:
        return []
    dense, served = pipeline.levels[0], pipeline.stage("serve").gave.get("sparsity")
    level = next((level for level in pipeline.levels if level.sparsity == served), pipeline.levels[-1])
    rise = _rise(level, dense, "decode")
    if rise is None:
        return []
    return [
        f"At sparsity {level.sparsity:g} decoding skips {units.percent(level.skipped)} of the blocks' weights; the "
        f"perplexity is {_perplexity(level, 'decode')} ({units.percent(rise, signed=True)})."
    ]


def _served_sentences(pipeline: Pipeline) -> list[str]:
    gave = pipeline.stage("serve").gave
    if not gave:
        return []
    how = "the tokens" if gave["same"] else "NOT the tokens"
    return [f"Served through the OpenAI API, it answered with {how} of the offline engine ({gave['tokens']} tokens)."]


def _settings_table(pipeline: Pipeline) -> Table:
    rows = [[key, text] for key, text in flatten(pipeline.settings).items()]
    return Table(title="Settings", header=["setting", pipeline.name], rows=rows, words=True)


def _commands(pipeline: Pipeline) -> list[str]:
    gave = pipeline.stage("serve").gave
    model, data = shlex.quote(gave["model"]), shlex.quote(pipeline.stage("prepare").gave["path"])
    return [
        f"raygrow serve {model} --name {shlex.quote(gave['model_id'])} --sparsity {gave['sparsity']:g}",
        f"raygrow evaluate {model} --data {data} --sparsity {gave['sparsity']:g}",
    ]
