"""Says which weights a file lacks, what it has in their place, and which tools write such files."""

from collections.abc import Sequence

# Prefix of names -> who writes it, and how names without it are come by. The longer one of two comes first.
_PREFIXES = {
    "base_model.model.": "PEFT writes it: save the result of merge_and_unload(), or give the adapter's own folder",
    "_orig_mod.": "torch.compile writes it: save the model that was compiled, model._orig_mod",
    "module.": "DataParallel, DistributedDataParallel and DeepSpeed write it: save the model inside, model.module",
    "_fsdp_wrapped_module.": "FSDP writes it: save the full state dict, as accelerate and Trainer do",
    "_checkpoint_wrapped_module.": "a wrapper for checkpoints of activations writes it: save the model inside",
    "_forward_module.": "Lightning Fabric writes it: save the model inside",
    "pretrained_model.": "TRL's models with a value head write it: save model.pretrained_model",
    "policy.": "trainers with several models write it: save the policy alone",
    "language_model.": "models of images and text write it: save their language model alone",
    "text_model.": "models of images and text write it: save their language model alone",
    "transformer.": "",
    "llm.": "",
}
# A piece of a name -> who writes such names.
_OTHER_FORMATS = {
    "lora_": "They are adapters: give the folder with their adapter_config.json, or save the result of "
    "merge_and_unload()",
    ".base_layer.": "They are a model with adapters of PEFT in it: save the result of merge_and_unload()",
    "tok_embeddings.": "They are in Meta's own format: convert_llama_weights_to_hf.py of transformers converts it",
    "attention.wq.": "They are in Meta's own format: convert_llama_weights_to_hf.py of transformers converts it",
    ".scales": "They are quantised: load the model that they were made from",
    ".qweight": "They are quantised: load the model that they were made from",
    ".weight_scale": "They are quantised: load the model that they were made from",
    "blk.": "They have the names of a .gguf file: give the .gguf file itself",
}
_HEAD = "lm_head.weight"


def missing_tensors(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Returns a message: names that are missing, those that are there without a place, and the remedy."""
    message = f"{len(missing)} tensors are missing from the weights: {some(missing)}"
    if missing == [_HEAD] and not extra:
        return message + (
            ". Models whose head is the embedding have none: if this is one, set tie_word_embeddings to true in "
            "config.json"
        )
    if not extra:
        return message
    message += f". In their place are {len(extra)} others: {some(extra)}"
    if prefixes := _prefix(missing, extra):
        parts = [f"{part!r} stands before the names{f': {who}' if who else ''}" for part, who in prefixes]
        return f"{message}. {'; '.join(parts)}"
    if all(f"model.{name}" in set(missing) for name in extra):
        return f"{message}. They lack 'model.': this is a model without its head; save the whole ...ForCausalLM"
    formats = [what for piece, what in _OTHER_FORMATS.items() if any(piece in name for name in extra)]
    return f"{message}. {formats[0]}" if formats else message


def some(names: Sequence[str]) -> str:
    """Returns the first ones of many names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _prefix(missing: Sequence[str], extra: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the prefixes, one behind the other, that stand before the names of weights that are missing."""
    missing_names = set(missing)
    for name in extra:
        bare, prefixes = name, []
        while True:
            parts = [part for part in _PREFIXES if part in bare]
            if not parts:
                break
            first = min(parts, key=bare.index)
            bare = bare.replace(first, "", 1)
            prefixes.append((first, _PREFIXES[first]))
            if bare in missing_names:
                return prefixes
    return _unknown_prefix(missing_names, extra)


def _unknown_prefix(missing: set[str], extra: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the text before the names, and nothing in its place, where nobody known writes it."""
    for name in extra:
        parts = name.split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[count:]) in missing:
                return [(".".join(parts[:count]) + ".", "")]
    return []
