"""The model families, by the `model_type` of their Hugging Face configuration.

A family is a module with three names: `WEIGHT_NAMES`, the two-way table between Hugging Face weight names and our
parameters; `from_hf_config` and `to_hf_config`, which read and write `config.json`. One outside of this package makes
itself known with `register` (docs/FAMILIES.md).
"""

import reprlib
from types import ModuleType

from jax_backtrack.errors import InputError
from jax_backtrack.models.families import gemma2, llama
from jax_backtrack.models.transformer import TransformerConfig

FAMILIES: dict[str, ModuleType] = {"llama": llama, "gemma2": gemma2}
_NAMES = ("WEIGHT_NAMES", "from_hf_config", "to_hf_config")


def register(model_type: str, family: ModuleType) -> None:
    """Makes a family of somebody else's known, for models whose `config.json` has this `model_type`.

    Raises InputError where the module lacks one of the three names, of which some are used only when a model is saved,
    or where another module has the `model_type`.
    """
    if missing := [name for name in _NAMES if not hasattr(family, name)]:
        raise InputError(f"the family {model_type!r} has no {', '.join(missing)} in {family.__name__}")
    if FAMILIES.get(model_type, family) is not family:
        raise InputError(f"the family {model_type!r} is in {FAMILIES[model_type].__name__} already")
    FAMILIES[model_type] = family


def from_hf_config(config: dict) -> TransformerConfig:
    """Reads a `config.json` given as a dict. Raises InputError for a family, or a setting of one, that is not here."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"config.json: model_type {reprlib.repr(model_type)} is not supported; known families are "
            f"{', '.join(sorted(FAMILIES))}. docs/FAMILIES.md says how to add one"
        )
    model = FAMILIES[model_type].from_hf_config(config)
    if model.num_attention_heads % model.num_key_value_heads:
        raise InputError(
            f"config.json: {model.num_attention_heads} attention heads do not divide by "
            f"{model.num_key_value_heads} key-value heads"
        )
    if model.head_dim % 2:
        raise InputError(f"config.json: head_dim = {model.head_dim} is odd; rope turns pairs of features")
    return model


def to_hf_config(config: TransformerConfig) -> dict:
    """Returns the fields of a `config.json` that `from_hf_config` reads back to the same configuration."""
    return FAMILIES[config.model_type].to_hf_config(config)


def weight_names(config: TransformerConfig) -> dict[str, tuple[str, int]]:
    """Returns, by our path, the Hugging Face name and how many leading axes of ours are inputs."""
    return FAMILIES[config.model_type].WEIGHT_NAMES
