"""What TRL's trainers make of the same rows with the same chat template: the same ids, or a reason why not."""

import copy
import importlib.util

import pytest

from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.data import sources
from jax_backtrack.data.examples import encode
from jax_backtrack.data.preferences import Report
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from tests.conftest import missing

ROWS = 60
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
SPOKEN = "{% for m in messages %}{% if m.role == 'user' %}USER{% else %}ASSISTANT{% endif %}: {{ m.content }}"
# Eight kinds of template, with SmolLM2's control tokens in the place of each model's own.
TEMPLATES = {
    "chatml": "{% for m in messages %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no newline before the reply": "{% for m in messages %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    "gemma": "<|endoftext|>{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "vicuna": SPOKEN
    + "{% if m.role == 'assistant' %}<|endoftext|>{% else %} {% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} <|im_end|>{% endif %}{% endfor %}",
    "mistral": "<|endoftext|>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "empty thoughts before the reply": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@pytest.fixture(scope="module")
def preferences(shared):
    found, _ = sources.read(str(shared / "data" / "hh-rlhf" / "harmless-base.jsonl.gz"), limit=ROWS)
    return found


@pytest.fixture(scope="module")
def rows(preferences):
    """The same rows in TRL's conversational format."""
    import datasets

    def said(reply):
        return [{"role": "assistant", "content": reply}]

    return datasets.Dataset.from_list(
        [dict(prompt=list(p.prompt), chosen=said(p.chosen), rejected=said(p.rejected)) for p in preferences]
    )


@pytest.fixture(scope="module")
def model():
    if importlib.util.find_spec("trl") is None:
        missing("TRL is not installed: pip install -r requirements-dev.txt")
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )


def by_sft(hf, model, rows, folder) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row, by TRL's SFTTrainer."""
    import trl

    arguments = trl.SFTConfig(folder, report_to=[], max_length=None, use_cpu=True, completion_only_loss=True)
    completions = rows.remove_columns("rejected").rename_column("chosen", "completion")
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=completions, processing_class=hf)
    made = []
    for row in trainer.train_dataset:
        begin = next(place for place, label in enumerate(row["labels"]) if label != -100)
        made.append((row["input_ids"][:begin], row["input_ids"][begin:]))
        assert row["labels"][begin:] == row["input_ids"][begin:]
    return made


def by_dpo(hf, model, rows, folder) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt and both replies of each row, by TRL's DPOTrainer."""
    import trl

    arguments = trl.DPOConfig(folder, report_to=[], max_length=None, use_cpu=True)
    trainer = trl.DPOTrainer(
        model, ref_model=copy.deepcopy(model), args=arguments, train_dataset=rows, processing_class=hf
    )
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_those_of_trls_trainers(name, tokenizer, preferences, rows, model, tmp_path):
    hf = copy.deepcopy(tokenizer.hf)
    hf.chat_template, hf.pad_token = TEMPLATES[name], "<|endoftext|>"
    ours = ChatTokenizer(hf)
    report = Report()
    examples = encode(preferences, ours, TreeSpec("dpo", False, "keep", None), 10**6, report)
    assert len(examples) == ROWS, report.lines()
    newline = hf.encode("\n", add_special_tokens=False)
    # What some templates write after the end of turn is nothing to learn: sampling ends there.
    after = newline if hf.apply_chat_template(rows[0]["prompt"], tokenize=False).endswith("\n") else []
    mine = [tuple(ids.tolist() for ids in (each.prompt, each.chosen, each.rejected)) for each in examples]
    theirs = by_dpo(hf, model, rows, str(tmp_path))
    assert theirs == [(prompt, chosen + after, rejected + after) for prompt, chosen, rejected in mine]
    assert by_sft(hf, model, rows, str(tmp_path)) == [(prompt, chosen + after) for prompt, chosen, _ in mine]
    assert [ours.render(each.prompt).tolist() for each in preferences] == [prompt for prompt, _, _ in mine]
