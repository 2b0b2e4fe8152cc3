"""The settings that the command line would compose from raygrow/conf."""

from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict


def composed(*overrides: str, name: str = "train") -> dict[str, Any]:
    """The tree of the file `name` under overrides such as `plan=gstack` and `++train.seq_len=64`."""
    OmegaConf.register_new_resolver("last", lambda path: str(path).rsplit("/")[-1], replace=True)
    with initialize_config_module("raygrow.conf", version_base="1.3"):
        config = compose(name, list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        tree: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        return tree
