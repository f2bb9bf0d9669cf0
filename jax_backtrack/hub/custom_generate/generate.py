"""Generation with resets: where the model says [RESET], what it wrote is a draft, and it answers again.

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(**inputs, custom_generate=folder, trust_remote_code=True, max_new_tokens=256)

The result is that of a plain `generate`, prompts and replies, with drafts and [RESET] left out. Every attempt at a
reply is a plain `generate` over the rows that are still open; sampling, caches and stop strings work as they do there.
"""

import copy
import dataclasses

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput

# What has no meaning, or another one, where rows begin again at different times.
_REFUSED = """
    assistant_early_exit assistant_model constraints force_words_ids guidance_scale inputs_embeds max_time min_length
    min_new_tokens negative_prompt_attention_mask negative_prompt_ids num_beams num_return_sequences output_attentions
    output_hidden_states output_logits output_scores past_key_values penalty_alpha position_ids prefix_allowed_tokens_fn
    prompt_lookup_num_tokens streamer synced_gpus token_healing
""".split()
_NEUTRAL = {"guidance_scale": 1, "num_beams": 1, "num_return_sequences": 1}  # of the others 0, False or None


def generate(
    inputs=None,
    generation_config=None,
    logits_processor=None,
    *,
    model,  # by name, as transformers gives it, so that `model.generate(input_ids)` works too where this replaces it
    input_ids=None,
    attention_mask=None,
    max_resets=1,
    reset_bias=0.0,
    reset_mode=None,
    prefix_length=0,
    custom_generate=None,
    trust_remote_code=None,
    **kwargs,
):
    """Prompts as given with a reply each, padded on the right: int64 `[rows, tokens]`.

    max_resets:     per reply; [RESET] is masked out after them
    reset_bias:     added to the logit of [RESET]: lower is fewer resets
    reset_mode:     what the model sees after a reset: "keep" (prompt, draft and [RESET]), "rewind" (prompt and
                    [RESET]) or "resample" (the prompt); None for the one that the model was trained with
    prefix_length:  how many tokens at the end of a prompt are the first ones of its reply, written for the model; one
                    number or one per row. A reset takes them back with the rest of the draft
    max_new_tokens: of a reply; 256 where neither it nor max_length is given. In the reset mode "keep" its drafts and
                    resets count, as they stay in the context; in the others each draft may be as long again

    With `return_dict_in_generate=True` the output has, beside `sequences`, `drafts` (per row a list of lists of ids)
    and `resets` (int64 `[rows]`). Other settings are those of a plain `generate`; what cannot be kept is refused.
    """
    del custom_generate, trust_remote_code  # there where `from_pretrained` has made this function `model.generate`
    config = copy.deepcopy(generation_config or model.generation_config)
    for name, value in model.generation_config.to_dict().items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    length = kwargs.get("max_length")  # asked for, even where it is the default of transformers
    kwargs = config.update(**kwargs)
    kwargs.pop("token_type_ids", None)  # some tokenizers give them; these models have none
    for name in _REFUSED:
        value = kwargs.pop(name, None) if name in kwargs else getattr(config, name, None)
        neutral = value is None or (isinstance(value, (int, float)) and value == _NEUTRAL.get(name, 0))
        if not neutral:
            raise ValueError(f"{name} is not supported in generation with resets")
    trained = getattr(model.config, "backtracking", None)
    if trained is None:
        raise ValueError("this model has no [RESET]: its config.json says nothing of 'backtracking'")
    reset_id = trained["reset_token_id"]
    if reset_mode is None:
        reset_mode = trained.get("reset_mode") or "rewind"
    _check_resets(reset_mode, trained.get("reset_mode"), max_resets, reset_bias, config.do_sample)

    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop_ids = {token for token in [*trained.get("stop_token_ids", []), *eos_ids] if token is not None} - {reset_id}
    pad_id = min(stop_ids) if config.pad_token_id is None else config.pad_token_id
    tokens = inputs if input_ids is None else input_ids
    if pad_id == reset_id:
        raise ValueError("pad_token_id is the id of [RESET]; it must be another one")
    _check_tokens(tokens, attention_mask, pad_id)
    rows = _rows(tokens, attention_mask, prefix_length, _budget(config, length, tokens.shape[1]))
    unused = trained.get("unused_token_ids", [])
    # Only a stop string, or a criterion of the caller, ends a row without a token that says so: padding follows.
    may_be_padded = bool(config.stop_strings or kwargs.get("stopping_criteria"))

    config.eos_token_id, config.pad_token_id = [*sorted(stop_ids), reset_id], pad_id
    config.max_length = GenerationConfig().max_length  # max_new_tokens stands for both
    as_dict, config.return_dict_in_generate = config.return_dict_in_generate, False
    while still_open := [row for row in rows if row.left]:
        config.max_new_tokens = max(row.left for row in still_open)
        width = max(len(row.context) for row in still_open)
        padded = [[pad_id] * (width - len(row.context)) + row.context for row in still_open]
        mask = [[0] * (width - len(row.context)) + [1] * len(row.context) for row in still_open]
        resets = ResetLogits(reset_id, reset_bias, torch.tensor([len(row.drafts) >= max_resets for row in still_open]))
        # The method of the class, because `model.generate` may be this function.
        attempt = type(model).generate(
            model,
            torch.tensor(padded, device=tokens.device),
            attention_mask=torch.tensor(mask, device=tokens.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([*(logits_processor or []), UnusedLogits(unused), resets]),
            **kwargs,
        )
        for row, new_ids in zip(still_open, attempt[:, width:].tolist(), strict=True):
            row.take(new_ids, stop_ids, reset_id, reset_mode, pad_id if may_be_padded else None)

    whole = [[pad_id] * (tokens.shape[1] - row.given) + row.prompt + row.reply for row in rows]
    longest = max(map(len, whole))
    sequences = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in whole], device=tokens.device)
    if not as_dict:
        return sequences
    output = GenerateDecoderOnlyOutput(sequences=sequences)
    output["drafts"] = [row.drafts for row in rows]
    output["resets"] = torch.tensor([len(row.drafts) for row in rows], device=tokens.device)
    return output


@dataclasses.dataclass
class Row:
    """A prompt and what comes of it.

    prompt, reply: ids; the reply is what stands since the last reset, the prefix included where there was none
    given:         tokens of prompt and prefix
    context:       ids that the next attempt begins with
    left:          tokens that may still be written; 0 for a row that is done
    drafts:        ids that were taken back
    """

    prompt: list
    reply: list
    given: int
    context: list
    left: int
    drafts: list = dataclasses.field(default_factory=list)

    def take(self, new_ids, ends, reset_id, reset_mode, pad_id=None):
        """Takes over what an attempt wrote, up to the first token that ends a reply or takes it back.

        pad_id: where padding may follow what was written; None where it cannot
        """
        new_ids = new_ids[: self.left]
        end = next((place for place, token in enumerate(new_ids) if token == reset_id or token in ends), None)
        while end is None and new_ids and new_ids[-1] == pad_id:
            new_ids.pop()
        if end is None or new_ids[end] != reset_id:
            self.reply += new_ids if end is None else new_ids[: end + 1]
            self.left = 0
            return
        self.drafts.append(self.reply + new_ids[:end])
        self.reply = []
        if reset_mode == "keep":
            self.left -= end + 1
        again = {"keep": self.context + new_ids[: end + 1], "rewind": [*self.prompt, reset_id], "resample": self.prompt}
        self.context = again[reset_mode]


class UnusedLogits(LogitsProcessor):
    """Masks ids that no token has: runs of them, each given by its first one and the one behind its last."""

    def __init__(self, runs):
        self.runs = runs

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for first, behind in self.runs:
            scores[:, first:behind] = -torch.inf
        return scores


class ResetLogits(LogitsProcessor):
    """Adds the bias to the logit of [RESET], and masks it in rows whose resets are spent."""

    def __init__(self, reset_id, bias, spent):
        self.reset_id, self.bias, self.spent = reset_id, bias, spent

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        biased = scores[:, self.reset_id] + self.bias
        scores[:, self.reset_id] = biased.masked_fill(self.spent.to(scores.device), -torch.inf)
        return scores


def _prefix_lengths(prefix_length, rows):
    """Returns one whole number for each row."""
    if isinstance(prefix_length, torch.Tensor):
        prefix_length = prefix_length.tolist()
    many = isinstance(prefix_length, (list, tuple))
    lengths = list(prefix_length) if many else [prefix_length] * rows
    if wrong := [length for length in lengths if not isinstance(length, int) or isinstance(length, bool)]:
        raise ValueError(f"prefix_length has {wrong[0]!r}; it must be a whole number, or a list of one for each row")
    if len(lengths) != rows:
        raise ValueError(f"prefix_length has {len(lengths)} numbers for {rows} rows")
    return lengths


def _rows(tokens, attention_mask, prefix_length, budget):
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    prefixes = _prefix_lengths(prefix_length, len(tokens))
    rows = []
    for row, is_token, prefix in zip(tokens, mask.bool().to(tokens.device), prefixes, strict=True):
        ids = row[is_token].tolist()
        if not 0 <= prefix < len(ids):
            raise ValueError(f"prefix_length is {prefix} in a row of {len(ids)} tokens; the prompt needs at least one")
        start = len(ids) - prefix
        rows.append(Row(prompt=ids[:start], reply=ids[start:], given=len(ids), context=ids, left=budget))
    return rows


def _budget(config, length, width):
    """Tokens that a row may write."""
    budget = 256
    if config.max_new_tokens is not None:
        budget = config.max_new_tokens
    elif length is not None or config.max_length != GenerationConfig().max_length:
        budget = (config.max_length if length is None else length) - width
    if budget < 1:
        raise ValueError(f"max_new_tokens or max_length leaves {budget} tokens for a reply; it must be at least 1")
    return budget


def _check_resets(reset_mode, trained, max_resets, reset_bias, do_sample):
    if reset_mode not in ("keep", "rewind", "resample"):
        raise ValueError(f"reset_mode is {reset_mode!r}; it may be 'keep', 'rewind' or 'resample'")
    if trained and reset_mode != "resample" and (reset_mode == "rewind") != (trained == "rewind"):
        raise ValueError(f"reset_mode {reset_mode!r}: the model was trained with {trained!r}; use that or 'resample'")
    if not isinstance(max_resets, int) or isinstance(max_resets, bool) or max_resets < 0:
        raise ValueError(f"max_resets is {max_resets!r}; it must be a whole number of at least 0")
    number = isinstance(reset_bias, (int, float)) and not isinstance(reset_bias, bool)
    if not number or not abs(reset_bias) < float("inf"):
        raise ValueError(f"reset_bias is {reset_bias!r}; it must be a finite number")
    if reset_mode == "resample" and max_resets and not do_sample:
        raise ValueError("reset_mode 'resample' needs do_sample=True: the same draft would return")


def _check_tokens(tokens, attention_mask, pad_id):
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or not tokens.numel():
        raise ValueError("input_ids must be a tensor [rows, tokens] with at least one of each")
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids is {tuple(tokens.shape)}")
    padded = (tokens[:, [0, -1]] == pad_id).any(dim=1)
    if attention_mask is None and padded.any() and not padded.all():
        raise ValueError("some rows begin or end with padding: give the attention_mask that the tokenizer makes")
