"""What is kept out of training: prompts of test sets, and a share by prompt."""

import pytest

from configs import sft_smollm
from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.data import sources
from jax_backtrack.data.held_out import asked_by, for_training, is_held_out
from jax_backtrack.data.preferences import Preference, Report
from jax_backtrack.data.sources import TESTBED
from jax_backtrack.training.data import encode_sources, read_sources


def preference(question: str, chosen: str = "Yes.") -> Preference:
    return Preference(({"role": "user", "content": question},), chosen, "No.", True, origin=question)


def test_what_a_test_set_asks_is_dropped_whatever_its_case_and_punctuation(tmp_path):
    (tmp_path / "set.csv").write_text('prompt,label\n"Where is Paris?",safe\nWho am I,unsafe\n')
    report, asked = Report(), asked_by([str(tmp_path / "set.csv")])
    kept = for_training(map(preference, ["where is paris", "Who am I?", "Who are you?"]), asked, 0, report)
    assert [each.origin for each in kept] == ["Who are you?"]
    assert report.dropped == {"data.exclude asks its prompt": 2}


def test_what_a_test_set_asks_is_found_in_every_turn_and_under_a_system_message(tmp_path):
    (tmp_path / "set.jsonl").write_text(
        '{"prompt": "Where is Paris?"}\n'
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},'
        ' {"role": "user", "content": "Who am I?"}]}\n'
    )
    asked = asked_by([str(tmp_path / "set.jsonl")])

    def excluded(*contents: str) -> bool:
        roles = ["system", *["user", "assistant"] * len(contents)]
        prompt = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        report = Report()
        kept = for_training([Preference(tuple(prompt), "Yes.", "No.", True, origin="row")], asked, 0, report)
        return not kept

    assert excluded("Be kind.", "where is paris?")
    assert excluded("", "Hi", "Hello.", "And where is Rome?", "Here.", "WHERE IS PARIS")
    assert excluded("", "Hi!", "Yes?", "Who am I?", "You.", "Thanks")  # a question of two turns, whatever was replied
    assert not excluded("", "Hi!", "Yes?", "Who are you?")  # its first turn alone
    assert not excluded("Where is Paris?", "Tell me.")  # not a user
    assert not excluded("", "Hi", "Where is Paris?", "Yes, where?")


def test_a_prompt_is_held_out_with_all_its_rows():
    pairs = [preference(f"question {number}", chosen) for number in range(2000) for chosen in ("a", "b")]
    report = Report()
    kept = for_training(pairs, frozenset(), 0.25, report)
    assert 0.22 < 1 - len(kept) / len(pairs) < 0.28
    assert report.dropped == {"its prompt is held out (data.held_out_fraction)": len(pairs) - len(kept)}
    assert not any(is_held_out(each.prompt, 0.25) for each in kept) and len(kept) == 2 * len({k.origin for k in kept})
    assert len(for_training(pairs, frozenset(), 0, Report())) == len(pairs)


def test_more_is_held_out_on_top_of_what_was():
    prompts = [preference(f"question {number}").prompt for number in range(200)]
    assert all(is_held_out(prompt, 0.5) for prompt in prompts if is_held_out(prompt, 0.2))


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_real_pairs_share_prompts_with_advbench(shared, held_out):
    pairs, report = sources.read(str(shared / "data/safety-pairs/jailbreakbench-llamaguard2.jsonl.gz"))
    asked = asked_by([str(shared / "data/prompts/advbench.csv")])
    kept = for_training(pairs, asked, held_out, report)
    assert report.dropped["data.exclude asks its prompt"] >= 56
    assert not {each.prompt[-1]["content"] for each in kept} & {
        line.split(",")[0] for line in (shared / "data/prompts/advbench.csv").read_text().splitlines()
    }


def test_utility_data_is_passed_over_several_times(reset_tokenizer, shared):
    config = sft_smollm.get_config()
    config.data.path, config.data.utility_path = TESTBED, str(shared / "data/oasst/messages.jsonl.gz")
    config.data.limit, config.data.utility_epochs = 12, 3
    recipe = TreeSpec("sft", True, "rewind", reset_tokenizer.reset_id)
    examples = encode_sources(read_sources(config), reset_tokenizer, recipe, config)
    utility = [example.origin for example in examples if "messages" in example.origin]
    assert len(examples) - len(utility) == 12
    assert utility == 3 * utility[: len(utility) // 3] and len(set(utility)) * 3 == len(utility)
