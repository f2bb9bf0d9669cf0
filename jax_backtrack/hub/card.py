"""The model card that lies in an export: what the model is, how it was trained, how it is used."""

from collections.abc import Mapping
from pathlib import Path

from flax.traverse_util import flatten_dict
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from jax_backtrack.hub.gguf import MODE_TAG, GGUFFile
from jax_backtrack.hub.peft import Adapter, has_adapter
from jax_backtrack.tokenizer.chat_tokenizer import RESET
from jax_backtrack.utils.console import warn
from jax_backtrack.utils.settings import settings
from jax_backtrack.utils.workdir import EXPORT

FILE = "README.md"
_LICENSE = ("license", "license_name", "license_link")

# Decisive fields that have a say with one objective only.
_OF_ONE_OBJECTIVE = {
    "train.reset_weight": "sft",
    "train.initial_reply_weight": "sft",
    "train.beta": "dpo",
    "train.rpo_alpha": "dpo",
}

_SEES_AFTER = {
    "keep": "the prompt, the draft and `[RESET]`: the draft stays in view, only the reader no longer sees it",
    "rewind": "the prompt and `[RESET]`: the draft is forgotten",
    "resample": "the prompt alone: draft and `[RESET]` are forgotten, so it needs a temperature above 0",
}

_WITHOUT_RESETS = {
    "keep": """\
Engines such as vLLM and llama.cpp write drafts and `[RESET]` into the reply. This model was trained with its draft in
view, and that is what it sees there too. So decode with special tokens kept (`skip_special_tokens=False` in vLLM,
`--special` in llama.cpp) and, when the text is complete, take what stands behind the last `[RESET]`. Nothing limits the
number of resets there.

```python
reply = text.rpartition("[RESET]")[2]
```
""",
    "rewind": """\
Engines such as vLLM and llama.cpp keep the draft in view. This model was trained to say `[RESET]` behind a draft, and
to answer behind the prompt and `[RESET]`. What comes after prompt, draft and `[RESET]` it never learnt, and it may go
on with the draft there: what stands behind `[RESET]` in such a text is not the model's reply and cannot be used. Make
`[RESET]` (id {reset_id}) a stop token instead, and where it stopped a request, send another one: the prompt's ids with
{reset_id} behind them.
""",
    "resample": """\
Engines such as vLLM and llama.cpp keep the draft in view. A `resample` model is trained as a `keep` model is, so what
stands behind the last `[RESET]` (special tokens kept when decoding) is a reply, but one given in view of the draft, as
with `keep`, and not a new sample from the prompt. For that, make `[RESET]` (id {reset_id}) a stop token, and where it
stopped a request, send the same prompt again, at a temperature above 0.
""",
}


def text(hf_config: Mapping, parameters: int, recipe: Mapping | None = None) -> str:
    """Returns the card as Markdown with YAML in front.

    hf_config:  what the export's config.json holds
    parameters: how many the model has
    recipe:     of the training, with sections as in `configs/base.py`; None where it is not known

    Of paths on this machine only the last part is told.
    """
    fields = flatten_dict(dict(recipe or {}), sep=".")
    backtracking = hf_config.get("backtracking")
    data_ids = [hub_id(fields[name]) for name in ("data.path", "data.utility_path") if fields.get(name)]
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(backtracking),
        **_origin(fields.get("model.path")),
        datasets=[data_id for data_id in data_ids if data_id] or None,
    )
    parts = [_introduction(hf_config, parameters, fields)]
    if backtracking:
        parts.append(_usage(backtracking))
    else:
        parts.append("## Use\n\nAs any language model of transformers; it has no `[RESET]`.\n")
    parts.append(_training(fields))
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n".join(parts)


def hub_id(path: str) -> str | None:
    """Returns `owner/name` where `path` names a model or data set on the Hub, None where it names something local."""
    name = path.partition(":")[0]
    if name.count("/") != 1 or Path(path).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name.endswith((".gguf", ".jsonl", ".json", ".parquet", ".gz")) else name


def _introduction(hf_config: Mapping, parameters: int, fields: Mapping) -> str:
    made_from = f", made from `{_shown(fields['model.path'])}`" if fields.get("model.path") else ""
    kind = f"A {hf_config['model_type']} model of {parameters:,} parameters{made_from}, written by jax_backtrack."
    if "backtracking" not in hf_config:
        return f"# Language model\n\n{kind}\n"
    return f"""\
# Language model with backtracking

{kind}

Its vocabulary has the token `{RESET}`. Where the model emits it, what it has written so far is a draft: the draft is
discarded and the model answers again. The method is that of Zhang et al., *Backtracking Improves Generation Safety*
([arXiv 2409.14586](https://arxiv.org/abs/2409.14586)).
"""


def _usage(backtracking: Mapping) -> str:
    reset_mode = backtracking.get("reset_mode")
    trained_for = (
        f"The model was trained with the reset mode `{reset_mode}`. After a reset it sees {_SEES_AFTER[reset_mode]}."
        if reset_mode
        else "The model is not known to have been trained to reset: no reset mode is recorded."
    )
    sampling = ", do_sample=True" if reset_mode == "resample" else ""
    temperature = ", temperature=1.0" if reset_mode == "resample" else ""
    usage = f"""\
## Resets

{trained_for}

With transformers, by the code in `custom_generate/generate.py`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "..."  # this folder, or its Hub id
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "How do I pick a lock?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = model.generate(
    **inputs, custom_generate=folder, trust_remote_code=True, max_new_tokens=256, max_resets=1{sampling}
)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`max_resets` is the number of resets per reply, and `reset_bias` is added to the logit of `{RESET}`: lower is fewer
resets. With `return_dict_in_generate=True` the drafts are returned too. In a plain `generate` nothing is taken back:
drafts and `{RESET}` stand in the reply. The tokenizer of transformers reads `{RESET}` as the token wherever a text
spells it, in a user's message too; jax_backtrack does not:

```python
import jax_backtrack

params = jax_backtrack.SamplingParams(max_new_tokens=256, max_resets=1{temperature})
sampler = jax_backtrack.Sampler(*jax_backtrack.load(folder), params)
for reply in sampler(["How do I pick a lock?"]):
    print(reply.drafts, reply.text)
```
"""
    if reset_mode:
        advice = _WITHOUT_RESETS[reset_mode].format(reset_id=backtracking["reset_token_id"])
        usage += f"\n### In engines that cannot reset\n\n{advice}"
    return usage


def _training(fields: Mapping) -> str:
    if not fields:
        return "## Training\n\nThis export was saved without a recipe: of the training nothing more is known here.\n"
    rows = [
        (name, f"`{_shown(fields[name])}`")
        for name, setting in settings().items()
        if setting.decisive and fields.get(name) not in (None, "", (), []) and _has_a_say(name, fields)
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""\
## Training

The recipe, by the names of jax_backtrack's fields:

| field | value |
|---|---|
{table}

The licences of the model and of the data it was made from apply.
"""


def _has_a_say(name: str, fields: Mapping) -> bool:
    """Returns whether a field changes what comes of this recipe."""
    if name == "data.limit":
        return fields[name] > 0
    if name.startswith("lora.") and not fields.get("lora.rank"):
        return False
    if ("reset" in name or name == "train.initial_reply_weight") and not fields.get("data.backtrack", True):
        return False
    return _OF_ONE_OBJECTIVE.get(name, fields.get("objective")) == fields.get("objective")


def _shown(value: object) -> object:
    """Returns a value; of a path that is no Hub id the last part only."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_shown, value))
    return value if not isinstance(value, str) or hub_id(value) else Path(value).name


def _tags(backtracking: Mapping | None) -> list[str]:
    """Tags for the Hub. Converters to .gguf copy them, so that the reset mode is one of them."""
    if backtracking is None:
        return ["jax_backtrack"]
    reset_mode = backtracking.get("reset_mode")
    return ["jax_backtrack", "backtracking", "safety"] + ([MODE_TAG + reset_mode] if reset_mode else [])


def _origin(path: str | None) -> dict[str, str]:
    """Returns `base_model` and `license` of what the model was made from, as far as they are known.

    A Hub id is the base. Workdirs of earlier runs and folders have them in their cards, .gguf files in their metadata.
    """
    if not path:
        return {}
    local = Path(path).expanduser()
    if local.suffix == ".gguf" and local.is_file():
        return GGUFFile(local).origin()
    export = local / EXPORT / FILE
    card = export if export.is_file() else local / FILE
    data = _front_matter(card) if card.is_file() else {}
    # The card of a folder names what the folder's own model was made from; only an export's is passed on.
    base = data.get("base_model") if card == export else Adapter(local).base if has_adapter(local) else path
    origin = {"base_model": hub_id(base) if isinstance(base, str) else None} | {
        name: data.get(name) for name in _LICENSE
    }
    return {name: value for name, value in origin.items() if value and isinstance(value, str)}


def _front_matter(card: Path) -> dict:
    """Returns the front matter of a card, nothing where it cannot be read: people write them by hand."""
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # YAML's errors are no ValueError
        warn(f"{card} has no metadata that can be read, so base and licence are not taken from it: {error}")
        return {}
