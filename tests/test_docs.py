"""The pages of docs say what there is: their links lead somewhere, and the reference of settings has every key."""

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

import raygrow.conf
from raygrow.config import RunConfig, WorkersConfig, build
from raygrow.data.corpus import DataConfig
from raygrow.infer.config import EngineConfig
from raygrow.nn.config import ModelConfig
from raygrow.runtime.openai.app import ApiConfig
from raygrow.runtime.serve_config import DeploymentConfig, IngressConfig
from raygrow.train.config import PhaseConfig, TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")))
TRAINING = (ROOT / "docs/training.md").read_text()
SERVING = (ROOT / "docs/serving.md").read_text()
CONF = Path(raygrow.conf.__file__).parent


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page may name, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_were_found() -> None:
    assert {Path("README.md"), Path("docs/training.md"), Path("benchmarks/README.md")} <= set(PAGES)


def keys(config: Any) -> set[str]:
    """The keys of a config, those of the configs inside it with their dots."""
    found: set[str] = set()
    for name, hint in get_type_hints(config).items():
        found |= {f"{name}.{key}" for key in keys(hint)} if is_dataclass(hint) else {name}
    return found


def named(page: str, section: str) -> str:
    """What stands between a heading and the next."""
    return re.split(rf"^## {section}$", page, flags=re.MULTILINE)[1].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("section", "prefix", "config"),
    [
        ("The run", "workers.", WorkersConfig),
        ("Plans", "", PhaseConfig),
        ("Training", "train.", TrainConfig),
        ("Models", "", ModelConfig),
        *[("Data", "", corpus) for corpus in get_args(DataConfig)],
    ],
)
def test_the_reference_of_training_names_every_key(section: str, prefix: str, config: Any) -> None:
    text = named(TRAINING, section)
    assert not [key for key in sorted(keys(config) - {"kind"}) if f"`{prefix}{key}`" not in text]


def test_the_reference_of_training_names_every_key_of_a_run() -> None:
    text = named(TRAINING, "The run")
    parts = {"model", "data", "plan", "train", "workers"}  # with sections of their own
    assert not [key.name for key in fields(RunConfig) if key.name not in parts and f"`{key.name}`" not in text]


def test_the_reference_of_training_names_every_file_of_settings() -> None:
    options = [file.relative_to(CONF / group) for group in ("model", "data", "plan") for file in files(group)]
    assert not [str(option) for option in options if f"{option.with_suffix('')}`" not in TRAINING]


def files(group: str) -> list[Path]:
    return list((CONF / group).rglob("*.yaml"))


@pytest.mark.parametrize(
    ("section", "prefix", "config"),
    [
        ("The run", "workers.", WorkersConfig),
        ("Training", "train.", TrainConfig),
        ("Models", "", ModelConfig),
        *[("Data", "", corpus) for corpus in get_args(DataConfig)],
    ],
)
def test_the_reference_of_training_has_the_defaults(section: str, prefix: str, config: Any) -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|([^|]*)\|", named(TRAINING, section), flags=re.MULTILINE)
    told = {key: default.strip() for names, default in rows for key in re.findall(r"`([^`]+)`", names)}
    for key, (hint, default) in default_values(config).items():
        cell = told[prefix + key]
        assert (build(hint, yaml.safe_load(cell), key) if cell else None) == default, key


def default_values(config: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of every key that has one, as `keys` names them."""
    hints = get_type_hints(config, include_extras=True)
    found: dict[str, tuple[Any, Any]] = {}
    for field in fields(config):
        hint = hints[field.name]
        if is_dataclass(hint):
            found |= {f"{field.name}.{key}": value for key, value in default_values(hint).items()}
        elif field.default is not MISSING and field.name != "kind":
            found[field.name] = hint, field.default
    return found


@pytest.mark.parametrize(
    ("prefix", "config"),
    [
        ("engine_kwargs", EngineConfig),
        ("deployment_config", DeploymentConfig),
        ("ingress", IngressConfig),
        ("api", ApiConfig),
    ],
)
def test_the_page_about_serving_names_every_key(prefix: str, config: Any) -> None:
    assert f"`{prefix}." in SERVING
    assert not [key for key in sorted(keys(config)) if not re.search(rf"[`.]{re.escape(key)}`", SERVING)]
