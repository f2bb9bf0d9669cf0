"""Seeds of replies: a reply's own, and those of another recipe's seed nowhere among them."""

from jax_backtrack import Sampler, SamplingParams
from jax_backtrack.data import testbed
from jax_backtrack.evaluation import mt_bench
from jax_backtrack.evaluation.run import run_condition
from jax_backtrack.sampling.seeds import reply_seeds
from tests import tiny


def test_seeds_of_neighbouring_recipes_have_none_in_common():
    drawn = [reply_seeds(seed, 1000) for seed in range(10)]
    assert len(set().union(*drawn)) == 10 * 1000
    assert all(0 <= seed < 2**32 for seeds in drawn for seed in seeds)


def test_a_replys_seed_does_not_depend_on_how_many_there_are():
    assert reply_seeds(7, 3) == reply_seeds(7, 1000)[:3]


def test_the_testbed_and_mt_bench_are_sampled_with_the_recipes_seed(reset_tokenizer, tmp_path):
    model = tiny.model(vocab_size=49152, max_position_embeddings=512)
    questions = [{"question_id": number, "turns": ["One?", "Two?"]} for number in range(2)]

    def replies(seed: int) -> tuple[list[str], list[str]]:
        params = SamplingParams(max_new_tokens=4, temperature=1.0, max_num_seqs=4, seed=seed)
        sampler = Sampler(model, reset_tokenizer, params)
        found = run_condition(sampler, None, testbed.prompt_set(2, private=True))
        mt_bench.write_answers(sampler, questions, "tiny", tmp_path / "answers.jsonl")
        lines = (tmp_path / "answers.jsonl").read_text().splitlines()
        return [each[0].reply.text for each in found.responses], [line.partition('"turns"')[2][:200] for line in lines]

    first, again, other = ([*map(str, replies(seed))] for seed in (0, 0, 1))
    assert [text.partition("tstamp")[0] for text in first] == [text.partition("tstamp")[0] for text in again]
    assert first[0] != other[0] and first[1] != other[1]
