"""The paper's comparison: SFT and DPO with and without backtracking, in the contexts `keep` and `rewind`.

    python main.py --config=replication/table.py --workdir=runs/replication --mode=run-stages \\
        --config.shared=../shared/data --config.judge=runs/judge

Every model is trained once for each seed and asked prompts that none was trained on. With the `cuts` the seven of the
paper's comparison took 112 minutes for three seeds on two busy cores; with `--config.scale=full` they are left out. The
two on own replies, another 56 minutes, are trained where `--config.order` names them.
"""

from ml_collections import ConfigDict

from configs import dpo_smollm, sft_smollm

# Baseline and backtracking model that differ in nothing else, by the order in which they are trained.
_MODELS = {
    "untrained": dict(objective="sft", backtrack=False, steps=0),
    "SFT": dict(objective="sft", backtrack=False),
    "SFT + DPO": dict(objective="dpo", backtrack=False, start="SFT"),
    "keep SFT": dict(objective="sft", reset_mode="keep"),
    "keep SFT + DPO": dict(objective="dpo", reset_mode="keep", start="keep SFT"),
    "rewind SFT": dict(objective="sft", reset_mode="rewind"),
    "rewind SFT + DPO": dict(objective="dpo", reset_mode="rewind", start="rewind SFT"),
    # Answers as before, and declines behind a reset only.
    "SFT on own replies": dict(objective="sft", backtrack=False, own_replies=True),
    "rewind SFT on own replies": dict(
        objective="sft",
        reset_mode="rewind",
        own_replies=True,
        initial_reply_weight=0.0,
        # Of those below, the one that takes few enough harmless replies back, by the half of the prompts that chooses.
        reset_bias=-4.0,
        reset_biases=(0.0, -1.0, -2.0, -3.0, -4.0),
    ),
}


def get_config():
    """Stages by name, seeds, and what is cut."""
    config = ConfigDict()
    config.shared = "data"  # the folder with prompts/, oasst/ and safety-pairs/
    config.judge = "refusals"  # as evaluate.judge
    config.scale = "small"  # "small", with the cuts, or "full"
    config.seeds = (0, 1, 2)  # of data and drafts, one training of every model each
    config.order = tuple(name for name, settings in _MODELS.items() if not settings.get("own_replies"))
    # Backtracking model -> the baseline that it is compared with.
    config.baselines = ConfigDict({name: _baseline(name) for name in _MODELS if name.startswith(("keep", "rewind"))})
    config.stages = ConfigDict()
    for name, settings in _MODELS.items():
        config.stages[name] = _stage(**settings)
    # Replies of the model as it comes, which those stages have as utility data.
    config.own_replies = sft_smollm.get_config()
    config.own_replies.data.utility_path = "{shared}/oasst/messages.jsonl.gz"
    config.own_replies.sample.update({"n": 4, "temperature": 0.8, "max_new_tokens": 256, "max_num_seqs": 32})
    # What is cut: of every stage, of those of an objective, and of the own replies.
    config.cuts = ConfigDict(
        {
            "all": {
                "data": {"max_response_length": 48},
                "train": {"max_seq_len": 512, "batch_size": 2, "logits_chunk_size": 64},
                "sample": {"max_new_tokens": 48},
                "evaluate": {"limit": 80},
            },
            "sft": {"train": {"steps": 30}},
            "dpo": {"train": {"steps": 10}},
            "own_replies": {"sample": {"max_new_tokens": 64}},
        }
    )
    return config


def _baseline(name: str) -> str:
    return name.split(" ", 1)[1]


def _stage(
    objective: str,
    *,
    backtrack: bool = True,
    reset_mode: str = "rewind",
    steps: int | None = None,
    start: str = "",
    own_replies: bool = False,
    initial_reply_weight: float = 1.0,
    reset_bias: float = 0.0,
    reset_biases: tuple[float, ...] = (),
):
    config = {"sft": sft_smollm, "dpo": dpo_smollm}[objective].get_config()
    config.reset.mode, config.sample.reset_bias = reset_mode, reset_bias
    config.data.path = "{shared}/safety-pairs/jailbreakbench-llamaguard2.jsonl.gz"
    config.data.utility_path = "{shared}/oasst/messages.jsonl.gz"
    config.data.utility_epochs = 10  # there are 52 replies of it, and 300 pairs
    if own_replies:
        config.data.utility_path, config.data.utility_epochs = "{own_replies}", 1
    config.data.backtrack = backtrack
    config.data.exclude = ("{shared}/prompts/advbench.csv", "{shared}/prompts/simple_safety_tests.csv")
    config.data.held_out_fraction = 0.25
    config.train.max_seq_len = 1536
    config.train.batch_size = 4
    config.train.steps = 200 if steps is None else steps
    config.train.checkpoint_every_steps = 0
    # One [RESET] stands against a whole reply, and its row has to leave those of the words that it starts among.
    config.train.reset_weight = 5.0
    config.train.initial_reply_weight = initial_reply_weight
    if objective == "sft":
        config.train.learning_rate = 5e-5
        config.train.reset_embedding_lr_scale = 50.0
    else:
        config.model.path = "{workdir}/" + start.replace(" ", "_")
        config.train.steps = 100
    config.sample.max_new_tokens = 256
    config.sample.max_num_seqs = 32
    config.evaluate.harmful = (
        "AdvBench={shared}/prompts/advbench.csv",
        "SimpleSafetyTests={shared}/prompts/simple_safety_tests.csv",
    )
    config.evaluate.harmless = (
        "XSTest={shared}/prompts/xstest.csv",
        "MT-Bench={shared}/prompts/mt_bench_question.jsonl",
    )
    config.evaluate.prefill = (10,)
    config.evaluate.reset_biases = reset_biases
    return config
