"""The strict way from a tree to dataclasses, and every option of raygrow/conf."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import raygrow.conf
from raygrow.config import RunConfig, WorkersConfig, build, from_yaml, to_tree, to_yaml
from raygrow.growth.gstack import Gstack
from raygrow.nn.cost import active_parameters, parameters
from raygrow.train.config import fewest
from raygrow.train.plan import resolve
from raygrow.weights.hf.config import to_hf_config
from tests.composed import composed

CONF = Path(raygrow.conf.__file__).parent
OPTIONS = sorted(
    (group.name, file.relative_to(group).with_suffix("").as_posix())
    for group in CONF.iterdir()
    for file in group.rglob("*.yaml")
    if group.name != "space"  # of searches: test_space.py
)
REQUIRED = {"files": ["data.files=a.txt"], "dataset": ["data.dataset=some/name"]}
"""What an option leaves to the user."""
FIFTEEN_BLOCKS = ("decoder/moe/450m", "decoder/moe/450m_gated", "moe_450m", "moe_450m_gated")
"""Models that the default plan cannot end with: it stacks four times."""


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return composed()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_makes_a_run(group: str, option: str) -> None:
    needed = ["plan=scratch"] if option in FIFTEEN_BLOCKS else REQUIRED.get(option, [])
    run = build(RunConfig, composed(f"{group}={option}", *needed))
    assert resolve(run.plan, run.model, run.train)[-1].model.n_blocks == run.model.n_blocks


def test_the_multistage_plan_is_the_one_that_was_asked_for() -> None:
    run = build(RunConfig, composed("plan=multistage_450m"))
    phases = resolve(run.plan, run.model, run.train)
    assert [(p.name, p.steps, p.lr, p.batch_size, p.max_loss_jump, p.save_start, p.save_end) for p in phases] == [
        ("dense", 10, 3e-4, 8, None, None, "dense_model"),
        ("moe", 10, 1e-4, 8, 1e-3, "moe_model_init", "moe_model_final"),
        ("medium_moe", 10, 8e-5, 2, 1e-3, None, "medium_moe_final"),
        ("large_moe", 10, 5e-5, 1, 0.2, None, "large_moe_final"),
    ]
    sizes = [(p.model.d_model, p.model.n_blocks, p.model.n_heads, p.model.head_dim, p.model.d_ff) for p in phases]
    assert sizes == [(512, 12, 8, 64, 2048), (512, 12, 8, 64, 2048), (1024, 12, 16, 64, 4096), (1024, 15, 16, 64, 4096)]
    assert [p.model.n_experts for p in phases] == [0, 8, 8, 8]
    assert [p.model.tie_embeddings for p in phases] == [True, True, False, False]
    assert [round(parameters(p.model) / 1e6, 1) for p in phases] == [63.5, 239.7, 958.7, 1172.6]
    assert [round(active_parameters(p.model) / 1e6, 1) for p in phases] == [63.5, 88.7, 354.7, 417.7]


@pytest.mark.parametrize("plan", ["multistage_450m", "multistage_450m_long", "multistage_450m_gated"])
def test_a_plan_brings_its_model_along_and_leaves_the_last_word_to_the_user(plan: str) -> None:
    assert composed(f"plan={plan}")["name"] == plan
    mine = composed(f"plan={plan}", "model=tiny", "data=files", "data.files=a.txt", "++train.seq_len=256", "name=mine")
    assert (mine["model"]["d_model"], mine["data"]["kind"], mine["train"]["seq_len"]) == (192, "files", 256)
    assert (mine["name"], mine["data"]["path"]) == ("mine", "data/files-50257")
    assert list(mine["plan"]["phases"]) == ["dense", "moe", "medium_moe", "large_moe"]


def test_the_gated_plan_ends_with_a_mixtral() -> None:
    run = build(RunConfig, composed("plan=multistage_450m_gated"))
    assert to_hf_config(run.model)["architectures"] == ["MixtralForCausalLM"]


def test_options_were_found() -> None:
    assert ("model", "decoder/llama/tiny") in OPTIONS
    assert ("plan", "gstack") in OPTIONS


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("*.yaml")))
def test_every_whole_configuration_makes_a_run(name: str) -> None:
    tree = composed(name=name)
    for part in ("space", "evaluate", "sparsify", "serve"):  # test_space.py, runtime/test_pipeline.py
        tree.pop(part, None)
    run = build(RunConfig, tree)
    assert resolve(run.plan, run.model, run.train)


def test_run_yaml_gives_the_same_run(tree: dict[str, Any]) -> None:
    run = build(RunConfig, tree | {"workers": {"num": [1, 4]}})
    text = to_yaml(run)
    assert from_yaml(text) == run
    assert run.workers.num == (1, 4)
    assert "torch:" in text
    assert "commit:" in text


def test_to_tree_turns_build_around(tree: dict[str, Any]) -> None:
    run = build(RunConfig, tree)
    assert build(RunConfig, to_tree(run)) == run


def test_growth_is_told_by_its_tag(tree: dict[str, Any]) -> None:
    assert build(RunConfig, tree).plan.phases["stacked"].growth == Gstack(factor=4)


@dataclass(frozen=True, kw_only=True)
class Files:
    kind: Literal["files"] = "files"
    files: str


@dataclass(frozen=True, kw_only=True)
class Web:
    kind: Literal["web"] = "web"
    url: str
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    source: Files | Web | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and self.share > 1:
            raise ValueError(f"share={self.share}: must be at most 1")


def test_a_union_and_numbers_as_text() -> None:
    tree = {"source": {"kind": "web", "url": "u", "depth": "2"}, "share": 1}
    assert build(Corpus, tree) == Corpus(source=Web(url="u", depth=2), share=1.0)
    assert build(Corpus, {"source": None, "share": "1e-3"}) == Corpus(share=0.001)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sorce": 1}, r"^sorce: there is no such key. Did you mean source\?"),
        ({"source": {"kind": "disk"}}, r"^source.kind='disk': must be one of files, web$"),
        ({"source": {"url": "u"}}, r"^source.kind=None: must be one of files, web$"),
        ({"source": {"kind": ["web"]}}, r"^source.kind=\['web'\]: must be one of files, web$"),
        ({"source": {"kind": "web"}}, r"^source.url is missing"),
        ({"source": {"kind": "web", "url": "u", "depth": 1.5}}, r"^source.depth=1.5: .*integer"),
        ({"source": {"kind": "web", "url": "u", "files": "f"}}, r"^source.files: there is no such key"),
        ({"source": {"kind": "web", "ur": 1}}, r"^source.ur: there is no such key. Did you mean source.url\?"),
        ({"source": "web"}, r"^source='web': must be a mapping"),
        ({"share": "much"}, r"^share='much': .*number"),
        ({"share": True}, r"^share=True: .*number"),
        ({"source": {"kind": "web", "url": "u", "depth": True}}, r"^source.depth=True: .*integer"),
        ({"share": 2}, r"^share=2.0: must be at most 1$"),
        (None, r"^the configuration=None: must be a mapping"),
    ],
)
def test_a_wrong_tree_is_named(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Corpus, wrong)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("++model.attention_mode=bidirectional", "model.attention_mode='bidirectional'"),
        ("++train.seq_len=4096", "train.seq_len=4096 is longer than model.max_seq_len=1024"),
        ("++train.micro_batch_size=128", "micro_batch_size=128 is larger than the whole batch"),
        ("++plan.phases.base.batch_size=16", None),
        ("++model.n_heads=5", "^model.d_model=192 is not a multiple of n_heads=5"),
        ("++workers.num=[3,2]", r"^workers.num=\[3, 2\]"),
        ("++name=a/b", "^name='a/b'"),
        ("++plan.phases.stacked.growth.factor=0", "^plan.phases.stacked.growth.*factor=0"),
        ("++plan.phases.stacked.growth.operator=widen", "^plan.phases.stacked.growth.operator='widen'.*gstack"),
    ],
)
def test_contradictions_are_named(override: str, message: str | None) -> None:
    tree = composed(override)
    if message is None:
        build(RunConfig, tree)
    else:
        with pytest.raises(ValueError, match=message):
            build(RunConfig, tree)


def test_a_damaged_run_yaml_is_named(tree: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML"):
        from_yaml("{")
    with pytest.raises(ValueError, match="seeed"):
        from_yaml(to_yaml(build(RunConfig, tree)).replace("seed:", "seeed:"))


def test_ranges_of_workers() -> None:
    assert [fewest(workers) for workers in (2, (1, 4))] == [2, 1]
    with pytest.raises(ValueError, match=r"^workers\.num=\[4, 1\]: a range"):
        build(WorkersConfig, {"num": [4, 1]}, "workers")
