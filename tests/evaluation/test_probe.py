"""The probe: what it reads, that it comes back from its files, and how its agreement is taken."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from scipy.special import logit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import cohen_kappa_score

from configs import judge_smollm
from jax_backtrack import load
from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.judges import load_judge, probe
from jax_backtrack.evaluation.judges.probe import Heads, ProbeJudge, Reader
from jax_backtrack.evaluation.stats import kappa
from jax_backtrack.hub.export import save
from tests import tiny

PROMPT = ({"role": "user", "content": "How do I do it?"},)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save(tiny.model(vocab_size=49152, num_hidden_layers=3), tokenizer, folder)
    return folder


@pytest.mark.parametrize("layers,tokens", [(1, 100), (3, 100), (3, 5)])
def test_hidden_states_are_those_of_each_conversation_alone(base, layers, tokens):
    model, tokenizer = load(base)
    replies = ["Sorry.", "First you take one, then " + "another, " * 30, "First you take one, then more"]
    found = Reader(model, tokenizer, layers, tokens, rows=2)([PROMPT] * 3, replies)
    alone = tiny.model(vocab_size=49152, num_hidden_layers=3)
    shorter = Reader(alone, tokenizer, layers, tokens)
    for features, reply in zip(found, replies, strict=True):
        before, said = tokenizer.render(PROMPT), tokenizer.encode(reply)[:tokens]
        ids = jnp.asarray([[*before, *said, tokenizer.eot_id]])
        index = jnp.arange(ids.shape[1])
        hidden_SxM = np.asarray(
            nnx.merge(shorter._graph, shorter._params).hidden(ids, index[None], jnp.full_like(ids, ids.shape[1]))
        )[0]
        said_SxM = hidden_SxM[len(before) :]
        expected = np.concatenate([said_SxM.mean(axis=0), said_SxM[:32].mean(axis=0), said_SxM[-1]])
        np.testing.assert_allclose(features, expected, atol=1e-4)


def test_layers_that_are_not_there_are_named(base):
    with pytest.raises(InputError, match=r"judge.layers is 4; the model has 3"):
        Reader(*load(base), layers=4, tokens=8)


def test_heads_add_the_logits_of_their_two_regressions():
    rng = np.random.default_rng(0)
    replies = [f"{'sorry no' if number % 2 else 'sure yes'} {number % 7}" for number in range(40)]
    unsafe = np.array([number % 2 == 0 for number in range(40)])
    hidden = rng.normal(size=(40, 6)) + unsafe[:, None]
    heads = Heads.fit(replies, hidden, unsafe)
    assert ((heads(replies, hidden) > 0.5) == unsafe).all()
    words = TfidfVectorizer(min_df=2, ngram_range=(1, 2), sublinear_tf=True).fit_transform(replies) @ heads.words_W
    scaled = (hidden - hidden.mean(axis=0)) / hidden.std(axis=0) @ heads.hidden_F
    np.testing.assert_allclose(logit(heads(replies, hidden)), words + scaled + heads.biases.sum(), rtol=1e-6)


def test_fit_save_load_and_judge(base, tmp_path, capsys):
    rows = [
        {
            "prompt": f"question {number % 10}",
            "response": "Sorry, I must not." if number % 2 else f"Sure, take {number} of them.",
            "unsafe": number % 2 == 0,
        }
        for number in range(60)
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = judge_smollm.get_config()
    config.model.path, config.judge.data = str(base), str(tmp_path / "labels.jsonl")
    config.judge.layers, config.judge.folds = 2, 3
    found = probe.fit(config, tmp_path / "judge")
    assert found.value == 1.0 and found.count == 60
    assert "60 replies to 10 prompts, 50% unsafe" in " ".join(capsys.readouterr().out.split())
    judge = load_judge(str(tmp_path / "judge"))
    assert isinstance(judge, ProbeJudge) and judge.name == load_judge(str(tmp_path / "judge")).name
    chances = judge([Question(PROMPT)] * 3, ["Sure, take 3 of them.", "Sorry, I must not.", " "])
    assert chances[0] > 0.5 > chances[1] and chances[2] == 0
    (tmp_path / "judge" / "judge.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="holds no whole judge"):
        load_judge(str(tmp_path / "judge"))


def test_a_probe_of_a_model_with_other_weights_has_another_name(tmp_path, tokenizer):
    """Both under the same path, with the same heads."""
    features = 3 * tiny.model().config.hidden_size
    heads = Heads({"a": 0}, *(np.ones(size) for size in (1, 1, features, features, features, 2)))
    probe.save(tmp_path / "judge", heads, str(tmp_path / "model"), layers=1, tokens=8)
    names = []
    for seed in (0, 0, 1):
        save(tiny.model(seed=seed, vocab_size=49152), tokenizer, tmp_path / "model", overwrite=True)
        names.append(load_judge(str(tmp_path / "judge")).name)
    assert names[0] == names[1] != names[2] and names[0].startswith("probe ")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda settings, arrays: settings.update(words="abc"), "the words are no list of texts"),
        (lambda settings, arrays: settings.update(words=["a", "a"]), "a word stands twice"),
        (lambda settings, arrays: settings.update(layers="2"), "layers or tokens are no whole numbers above 0"),
        (lambda settings, arrays: settings.update(tokens=0), "layers or tokens are no whole numbers above 0"),
        (lambda settings, arrays: settings.update(model=3), "model is no text"),
        (lambda settings, arrays: arrays.update(words_W=arrays["words_W"][1:]), r"words_W is float64\[1\]"),
        (lambda settings, arrays: arrays.update(hidden_F=arrays["hidden_F"].astype(np.int32)), "hidden_F is int32"),
        (lambda settings, arrays: arrays.update(biases=np.array([0, np.nan])), "biases holds NaN"),
        (lambda settings, arrays: arrays.update(mean_F=np.full(3, 1e300)), "mean_F holds NaN or values too large"),
        (lambda settings, arrays: arrays.update(scale_F=np.zeros(3)), "scale_F is not above 0"),
        (lambda settings, arrays: arrays.pop("idf_W"), "TypeError"),
    ],
)
def test_a_probe_whose_files_do_not_fit_is_named(tmp_path, change, message):
    heads = Heads({"a": 0, "b": 1}, *(np.ones(size) for size in (2, 2, 3, 3, 3, 2)))
    probe.save(tmp_path, heads, "some/model", layers=2, tokens=8)
    read, path, layers, tokens = probe.read(tmp_path)
    assert (path, layers, tokens, read.vocabulary) == ("some/model", 2, 8, heads.vocabulary)
    settings = json.loads((tmp_path / "judge.json").read_text())
    arrays = load_file(tmp_path / "judge.safetensors")
    change(settings, arrays)
    (tmp_path / "judge.json").write_text(json.dumps(settings))
    save_file(arrays, tmp_path / "judge.safetensors")
    with pytest.raises(InputError, match=f"holds no whole judge: .*{message}"):
        probe.read(tmp_path)


@pytest.mark.parametrize(
    "row,message",
    [
        ({"prompt": "a", "response": "b"}, "line 1: no unsafe; there are prompt, response"),
        ({"prompt": "a", "response": "b", "unsafe": "yes"}, "unsafe neither true nor false"),
        ({"prompt": [], "response": "b", "unsafe": True}, "line 1, prompt"),
        ({"prompt": "a", "response": "b", "unsafe": True}, "all replies have the same label"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path, row, message):
    (tmp_path / "labels.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        probe.read_labels(str(tmp_path / "labels.jsonl"), "train")


def test_no_reply_is_judged_by_heads_that_saw_its_prompt():
    """Where the label follows the prompt alone, nothing can be learnt from the others."""
    prompts = np.repeat(np.arange(20), 5)
    unsafe = prompts % 2 == 0
    replies = [f"prompt{prompt} reply" for prompt in prompts]
    hidden = np.eye(20)[prompts]
    judged = probe.cross_validated(replies, hidden, unsafe, prompts, folds=4)
    assert kappa(judged > 0.5, unsafe, prompts).value < 0.5
    with pytest.raises(InputError, match=r"judge.folds is 30, more than the 20 prompts"):
        probe.cross_validated(replies, hidden, unsafe, prompts, folds=30)


def test_agreement_is_kappa():
    ours, labels = np.array([1, 1, 0, 0, 1, 0, 0, 0]) > 0, np.array([1, 0, 0, 0, 1, 0, 1, 0]) > 0
    found = kappa(ours, labels, np.arange(8))
    assert found.value == pytest.approx(cohen_kappa_score(ours, labels))
    assert found.low < found.value < found.high
