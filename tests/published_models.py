"""Published models, made small: recipes that compile what theirs would."""

SMALL = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


def config_of(recipe, folder, **fields):
    config = recipe.get_config()
    small = {"model.path": str(folder), "train.batch_size": 2, "train.max_seq_len": 1024, "sample.max_num_seqs": 2}
    sampled = {"sample.max_new_tokens": 16, "sample.temperature": 0.7, "sample.top_p": 0.9, "sample.top_k": 8}
    config.update_from_flattened_dict(small | sampled | {"model.compute_dtype": "auto"} | fields)
    return config
