"""What decides a pipeline: a run, and how its model is evaluated, made sparse and served. All is checked first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import NonNegativeInt, PositiveInt

from raygrow.config import RunConfig, build, to_tree
from raygrow.data.sampler import Sampler, fixed_batch
from raygrow.data.shards import MANIFEST_FILE, TOKENIZER_FOLDER, open_tokens
from raygrow.evaluate.sparsify import calibration_length, check_calibration
from raygrow.infer.config import EngineConfig, longest_sequence
from raygrow.nn.config import ModelConfig
from raygrow.runtime.openai.app import ApiConfig
from raygrow.runtime.serve_config import (
    DeploymentConfig,
    IngressConfig,
    LLMConfig,
    ModelLoadingConfig,
    ServeConfig,
)
from raygrow.sparsity.config import SparsifyConfig, check_model
from raygrow.text.tokenizer import load_tokenizer
from raygrow.train.plan import resolve

_RUN_DECIDES = ("seed", "model", "data", "plan", "train", "control")
_SERVE_DECIDES = ("prompt", "tokens", "engine_kwargs")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """On how much of the validation text the finished model is scored, dense and at every sparsity."""

    sequences: NonNegativeInt = 0
    """0 is all."""
    batch_size: PositiveInt = 8


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How the sparse model is served, and what it is asked to prove that it answers."""

    keep: bool = False
    """Go on serving, in the foreground, when everything else is done."""
    host: str = "127.0.0.1"
    port: PositiveInt = 8000
    prompt: str = "def "
    """A text to continue, greedily."""
    tokens: PositiveInt = 32
    """Of the answer, at most."""
    engine_kwargs: EngineConfig = field(default_factory=EngineConfig)
    """`sparsity` is one that the model is made for; the largest when not given."""
    deployment_config: DeploymentConfig = field(default_factory=DeploymentConfig)
    ingress: IngressConfig = field(default_factory=IngressConfig)
    api: ApiConfig = field(default_factory=ApiConfig)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The whole way from text to a served sparse model.

    Raises:
        ValueError: If parts that are each fine contradict one another; names the keys.
    """

    run: RunConfig
    """As `raygrow train` takes it; its name and place are the pipeline's."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sparsify: SparsifyConfig = field(default_factory=SparsifyConfig)
    serve: AnswerConfig = field(default_factory=AnswerConfig)

    def __post_init__(self) -> None:
        for problem in _contradictions(self):
            raise ValueError(problem)

    @property
    def root(self) -> Path:
        """The folder of everything."""
        return Path(self.run.storage_path).expanduser().resolve() / self.run.name

    @property
    def training(self) -> RunConfig:
        """The run that the stage `train` trains."""
        return replace(self.run, name="train", storage_path=str(self.root))

    @property
    def model(self) -> ModelConfig:
        """The finished model."""
        return resolve(self.run.plan, self.run.model, self.run.train)[-1].model

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence in which the finished model is evaluated: what it was trained with at last."""
        return resolve(self.run.plan, self.run.model, self.run.train)[-1].seq_len

    @property
    def calibration(self) -> SparsifyConfig:
        """How the model is made sparse, on sequences as long as it was trained with unless told otherwise."""
        return replace(self.sparsify, seq_len=self.sparsify.seq_len or self.seq_len)

    def served(self, model: Path, levels: Sequence[float]) -> ServeConfig:
        """The app that serves a sparse model at the level that was asked for, or at the last of those that it has."""
        engine = self.serve.engine_kwargs
        sparsity = levels[-1] if engine.sparsity is None else engine.sparsity
        llm = LLMConfig(
            model_loading_config=ModelLoadingConfig(model_id=self.run.name, model_source=str(model)),
            engine_kwargs=replace(engine, sparsity=sparsity),
            deployment_config=self.serve.deployment_config,
        )
        return ServeConfig(llm_configs=(llm,), api=self.serve.api, ingress=self.serve.ingress)

    def deciding(self, stage: str) -> dict[str, Any]:
        """The settings that decide what a stage gives, as a plain tree by their full keys."""
        if stage == "prepare":
            return {"data": to_tree(self.run.data)}
        if stage == "train":
            return {key: to_tree(getattr(self.run, key)) for key in _RUN_DECIDES}
        if stage == "serve":
            return {"serve": {key: to_tree(getattr(self.serve, key)) for key in _SERVE_DECIDES}}
        return {stage: to_tree(getattr(self, stage))}

    def check_data(self) -> None:
        """Makes sure that the prepared text is enough for everything that is to be done with it.

        Raises:
            FileNotFoundError: If there is no prepared data.
            ValueError: If it was made with too large a vocabulary, or is too short.
        """
        path, run, model = Path(self.run.data.path), self.run, self.model
        train, validation = (open_tokens(path, split, verify=False) for split in ("train", "validation"))
        if train.manifest.vocab_size > run.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={run.model.vocab_size} is smaller than the vocabulary of the tokenizer that {path} "
                f"was prepared with, {train.manifest.vocab_size}: raise it, or prepare the data again"
            )
        seq_len = run.train.seq_len
        Sampler(train, seq_len=seq_len, window=seq_len, seed=run.seed)
        fixed_batch(validation, 1, max(seq_len, self.calibration.seq_len))
        check_calibration(train, model, self.calibration, path)
        self._check_prompt(len(load_tokenizer(path / TOKENIZER_FOLDER).encode(self.serve.prompt, special_tokens=True)))

    def _check_prompt(self, tokens: int) -> None:
        longest = longest_sequence(self.serve.engine_kwargs, self.model)
        if tokens + self.serve.tokens > longest:
            raise ValueError(
                f"serve.prompt has {tokens} tokens and its answer serve.tokens={self.serve.tokens}, more than the "
                f"{longest} that the engine takes: shorten one of them"
            )


def read_pipeline(tree: Mapping[str, Any]) -> PipelineConfig:
    """The pipeline of a composed tree: a run's keys, and beside them `evaluate`, `sparsify` and `serve`.

    Raises:
        ValueError: If a key is unknown or missing, a value is not allowed, or parts contradict one another.
    """
    own = {f.name: f.type for f in fields(PipelineConfig) if f.name != "run"}
    run: RunConfig = build(RunConfig, {key: value for key, value in tree.items() if key not in own})
    parts = {key: build(kind, tree[key], key) for key, kind in own.items() if key in tree}
    return PipelineConfig(run=run, **parts)


def completed(stage: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What `deciding` gave when it was taken down, with the keys that there are only since then at their defaults.

    Raises:
        ValueError: If it holds what this version does not know; names the key.
    """
    kinds = {**get_type_hints(RunConfig, include_extras=True), **get_type_hints(PipelineConfig)}
    found = {key: to_tree(build(kinds[key], value, key)) for key, value in recorded.items()}
    return {"serve": {key: found["serve"][key] for key in _SERVE_DECIDES}} if stage == "serve" else found


def as_tree(config: PipelineConfig) -> dict[str, Any]:
    """The plain tree that `read_pipeline` turns into an equal config again."""
    return {**to_tree(config.run), **{key: to_tree(getattr(config, key)) for key in ("evaluate", "sparsify", "serve")}}


def check_prepared(config: PipelineConfig) -> None:
    """Checks data that is there already; what is still to be prepared is checked when it is."""
    if (Path(config.run.data.path) / MANIFEST_FILE).exists():
        config.check_data()


def _contradictions(config: PipelineConfig) -> Iterable[str]:
    """What single components cannot see, one sentence each, most basic first."""
    run = config.run
    if "://" in run.storage_path:
        yield (
            f"storage_path={run.storage_path}: a pipeline reads the model that it has trained as a folder; name one "
            "that all machines see"
        )
    tokenizer = run.data.tokenizer
    if tokenizer.path is None and tokenizer.vocab_size > run.model.vocab_size:
        yield (
            f"data.tokenizer.vocab_size={tokenizer.vocab_size} is more than model.vocab_size={run.model.vocab_size}: "
            "the model would not know all tokens; raise the second or lower the first"
        )
    model = config.model  # raises what is wrong with the plan
    try:
        check_model(model, config.sparsify, "the finished model")
        calibration_length(model, config.calibration)
    except ValueError as error:
        yield f"sparsify: {error}"
    levels, wanted = config.sparsify.levels, config.serve.engine_kwargs.sparsity
    if wanted is not None and config.sparsify.method == "relu":
        yield (
            f"serve.engine_kwargs.sparsity={wanted:g}: with sparsify.method=relu the model has a level of its own; "
            "set serve.engine_kwargs.sparsity=null, and that one is served"
        )
    if wanted is not None and wanted not in levels:
        held = ", ".join(f"{level:g}" for level in levels)
        yield (
            f"serve.engine_kwargs.sparsity={wanted:g}: the model is made for sparsify.sparsity={held}; choose one of "
            "them, or add this one there"
        )
    try:
        longest = longest_sequence(config.serve.engine_kwargs, model)
    except ValueError as error:
        yield f"serve.engine_kwargs.{error}"
        return
    if config.serve.tokens >= longest:
        yield f"serve.tokens={config.serve.tokens}: the engine takes {longest} tokens, the prompt's included; lower it"
