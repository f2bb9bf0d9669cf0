"""Weights in and out: every dtype, sharded files, and an error of its own for everything that can be wrong."""

import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import jax_backtrack
from jax_backtrack.errors import InputError
from jax_backtrack.hub import weights
from jax_backtrack.hub.load import load
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.hub.safetensors_folder import INDEX_FILE, SINGLE_FILE
from jax_backtrack.models import families
from tests import tiny
from tests.chat_tokenizers import small_tokenizer
from tests.checkpoints import TOLERANCE, port, random_model, random_tokens, relative_error, rewrite_config, torch_logits

TOKENS = random_tokens((2, 40))
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def untied(written, tmp_path):
    """A copy of the untied Llama, to be broken."""
    return shutil.copytree(written / "Llama-3.1-8B", tmp_path / "model")


@pytest.fixture
def tied(written, tmp_path):
    return shutil.copytree(written / "Llama-3.2-1B", tmp_path / "model")


def rewrite(folder, change) -> None:
    """Changes the dict of a folder's tensors."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def params(model) -> dict[str, np.ndarray]:
    return {str(path): np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def assert_equal(one, other) -> None:
    one, other = params(one), params(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype
        np.testing.assert_array_equal(value, other[path], err_msg=path)


# ---------------------------------------------------------------------------------------------- dtypes and shards


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_file_of_any_dtype_loads_into_any_param_dtype(untied, stored, dtype):
    exact = port(untied)

    def cast(tensors):
        tensors |= {name: tensor.astype(jnp.dtype(stored)) for name, tensor in tensors.items()}

    rewrite(untied, cast)
    expected = {path: value.astype(jnp.dtype(stored)).astype(jnp.dtype(dtype)) for path, value in params(exact).items()}
    loaded = params(port(untied, dtype))
    for path, value in expected.items():
        assert loaded[path].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)


@pytest.mark.parametrize("shape", ["Llama-3.1-8B", "Llama-3.2-1B", "Gemma-2-2B"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_saved_in_shards_is_the_same_to_us_and_to_transformers(
    written, tmp_path, shape, dtype, record_property
):
    model = port(written / shape, dtype)
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf_config(model.config)))
    weights.save(model, tmp_path, max_shard_bytes=600_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in params(model).values())
    again = port(tmp_path, dtype)
    assert_equal(again, model)
    assert again.config == model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    expected = torch_logits(theirs, TOKENS)
    error = relative_error(port(tmp_path, "float32")(TOKENS), expected)
    record_property("largest_error", error)
    assert error < TOLERANCE


def test_shards_that_transformers_wrote_load_as_one_file(written, tmp_path):
    random_model("Llama-3.1-8B").save_pretrained(tmp_path, max_shard_size="500KB")
    assert (tmp_path / INDEX_FILE).exists()
    assert_equal(port(tmp_path), port(written / "Llama-3.1-8B"))


# -------------------------------------------------------------------------------------------- tensors that are wrong


def test_a_missing_tensor_is_named(untied):
    rewrite(untied, lambda tensors: tensors.pop(LAYER))
    with pytest.raises(InputError, match=rf"1 tensors are missing.*{LAYER}"):
        port(untied)


def test_an_extra_tensor_is_named(untied):
    rewrite(untied, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(3, np.float32)}))
    with pytest.raises(InputError, match=r"no place in the model: model\.layers\.0\.self_attn\.q_proj\.bias"):
        port(untied)


def test_a_layer_too_many_is_named(untied):
    rewrite_config(untied, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"9 tensors .* no place in the model: model\.layers\.2\."):
        port(untied)


def test_a_misshapen_tensor_is_named(untied):
    rewrite(untied, lambda tensors: tensors.update({"model.norm.weight": np.zeros(47, np.float32)}))
    with pytest.raises(InputError, match=r"model\.norm\.weight has shape \(47,\).*\(192,\)"):
        port(untied)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_a_weight_that_is_not_finite_is_named(untied, value, stored):
    def spoil(tensors):
        tensors[LAYER][3, 4] = value
        tensors[LAYER] = tensors[LAYER].astype(jnp.dtype(stored))

    rewrite(untied, spoil)
    with pytest.raises(InputError, match=f"{LAYER} holds NaN, or values that are infinite in float32"):
        port(untied)


def test_a_weight_too_large_for_the_param_dtype_is_named(untied):
    def spoil(tensors):
        tensors[LAYER][3, 4] = np.finfo(np.float32).max

    rewrite(untied, spoil)
    port(untied, "float32")
    with pytest.raises(InputError, match=f"{LAYER} holds .* infinite in bfloat16"):
        port(untied, "bfloat16")


def test_a_dtype_that_is_no_floating_one_is_named(untied):
    rewrite(untied, lambda tensors: tensors.update({LAYER: tensors[LAYER].astype(np.int8)}))
    with pytest.raises(InputError, match=f"{LAYER} is stored as I8; F32, F16, BF16 are read"):
        port(untied)


def test_a_head_beside_a_tied_embedding_must_equal_it(tied):
    before = port(tied)
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    assert_equal(port(tied), before)

    def spoil(tensors):
        tensors["lm_head.weight"][300, 7] += 1

    rewrite(tied, spoil)
    with pytest.raises(InputError, match=r"ties the embeddings, but lm_head\.weight .* differ"):
        port(tied)


# ---------------------------------------------------------------------------------------------- files that are wrong


def test_a_truncated_file_is_named(untied):
    file = untied / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        port(untied)


def lie_longer_header(header: dict, size: int) -> tuple[dict, int]:
    return header, size + 10**9


def lie_offsets(header: dict, size: int) -> tuple[dict, int]:
    header[LAYER]["data_offsets"] = [0, 10**12]
    return header, size


def lie_shape(header: dict, size: int) -> tuple[dict, int]:
    header[LAYER]["shape"] = [10**6, 10**6]
    return header, size


def lie_overlap(header: dict, size: int) -> tuple[dict, int]:
    header[LAYER]["data_offsets"] = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    return header, size


def lie_dtype(header: dict, size: int) -> tuple[dict, int]:
    header[LAYER]["dtype"] = "F33"
    return header, size


@pytest.mark.parametrize("lie", [lie_longer_header, lie_offsets, lie_shape, lie_overlap, lie_dtype])
def test_a_lying_header_is_named(untied, lie):
    content = (untied / SINGLE_FILE).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header, _ = lie(header, size)
    text = json.dumps(header).encode()
    claimed = lie(header, len(text))[1]
    (untied / SINGLE_FILE).write_bytes(struct.pack("<Q", claimed) + text + data)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read as safetensors"):
        port(untied)


def in_shards(folder) -> dict:
    """Splits the folder's weights into two files; the index."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    return {"weight_map": {name: file for file, part in halves.items() for name in part}}


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda places: places.update(x="c.safetensors"),
            r"index\.json names the file c\.safetensors, which is not there",
        ),
        (
            lambda places: places.update(x="a.safetensors"),
            r"says that x is in a\.safetensors, which has no such tensor",
        ),
        (lambda places: places.update(x="../a.safetensors"), r"places x in '\.\./a\.safetensors'"),
        (lambda places: places.update(x=3), "places x in 3"),
        (lambda places: places.update(x="x" * 300), "names the file x+, which is not there"),
        (lambda places: [places.pop(name) for name in list(places) if places[name] == "b.safetensors"], "are missing"),
    ],
    ids=["no such file", "no such tensor", "outside", "no name", "no file's name", "half"],
)
def test_a_wrong_index_is_named(untied, change, message):
    index = in_shards(untied)
    (untied / INDEX_FILE).write_text(json.dumps(index))
    port(untied)
    change(index["weight_map"])
    (untied / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        port(untied)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(untied, text):
    (untied / INDEX_FILE).write_text(text)
    with pytest.raises(InputError, match="is not an index"):
        port(untied)


def test_a_tensor_in_two_files_is_named(untied):
    index = in_shards(untied)
    doubled = next(name for name, file in index["weight_map"].items() if file == "a.safetensors")
    extra = load_file(untied / "b.safetensors") | {doubled: np.zeros(3, np.float32)}
    save_file(extra, untied / "b.safetensors")
    (untied / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"{doubled} is in a\.safetensors and in b\.safetensors"):
        port(untied)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(untied, name):
    (untied / SINGLE_FILE).rename(untied / name)
    with pytest.raises(InputError, match=rf"only .*{name}.*never loaded"):
        port(untied)


# --------------------------------------------------------------------------------------------------- whole folders


@pytest.mark.parametrize(
    "shape,name,vocabulary", [("Llama-3.1-8B", "llama3", 128256), ("Gemma-2-2B", "gemma2", 256000)]
)
def test_a_real_vocabulary_with_reset_goes_out_and_in(shape, name, vocabulary, tmp_path, request, record_property):
    """From transformers to us, with [RESET], saved, and loaded again by both."""
    theirs = random_model(shape, vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    theirs.save_pretrained(tmp_path / "in")
    for file in request.getfixturevalue(f"{name}_folder").iterdir():
        shutil.copy(file, tmp_path / "in")
    model, plain = load(tmp_path / "in", chat_template=name)
    tokenizer = add_reset(model, plain)
    tokenizer.reset_mode = "rewind"
    assert model.config.vocab_size == vocabulary
    jax_backtrack.save(model, tokenizer, tmp_path / "out")

    again, loaded = load(tmp_path / "out")
    assert_equal(again, model)
    assert again.config == model.config
    assert (loaded.reset_id, loaded.eot_id, loaded.reset_mode) == (tokenizer.reset_id, tokenizer.eot_id, "rewind")
    messages = [{"role": "user", "content": "Is [RESET] a word? <b>Yes</b>"}]
    tokens = loaded.render(messages)
    assert tokens.tolist() == tokenizer.render(messages).tolist()
    tokens = np.append(tokens, [loaded.reset_id, 1000]).astype(np.int32)[None]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.backtracking["reset_token_id"] == loaded.reset_id
    error = relative_error(model(tokens), torch_logits(theirs, tokens))
    record_property("largest_error", error)
    assert error < TOLERANCE


def test_a_tokenizer_larger_than_the_embedding_is_refused(written, tmp_path, reset_tokenizer):
    folder = shutil.copytree(written / "Llama-3.1-8B", tmp_path / "model")
    reset_tokenizer.hf.save_pretrained(folder)
    with pytest.raises(InputError, match="ids up to 49151, the embedding has 512 rows"):
        load(folder)


def test_saving_refuses_to_overwrite(reset_tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(InputError, match="would be overwritten"):
        jax_backtrack.save(tiny.model(vocab_size=49152), reset_tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()


def test_remat_changes_nothing(written):
    def gradient(remat, shape):
        graph, params = nnx.split(port(written / shape, remat=remat))
        return jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(TOKENS) ** 2).mean()))(params)

    alone = jax.tree.leaves(gradient("none", "Gemma-2-2B"))
    for remat in ("dots", "full"):
        for one, other in zip(alone, jax.tree.leaves(gradient(remat, "Gemma-2-2B")), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * float(np.abs(one).max()))


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('["model_type"]', "holds no object"),
        ("null", "holds no object"),
        ('{"backtracking": 3}', "backtracking = 3 is not an object"),
        ('{"backtracking": {"reset_mode": "foo"}}', "reset_mode = 'foo' is none of keep, rewind, resample"),
        ('{"backtracking": ' + "[" * 900 + "]" * 900 + "}", "is not an object"),
    ],
    ids=lambda value: value[:20],
)
def test_a_configuration_that_is_none_is_named(untied, reset_tokenizer, text, message):
    reset_tokenizer.hf.save_pretrained(untied)
    if text.startswith("{") and len(text) > 1:
        rewrite_config(untied, **json.loads(text))
    else:
        (untied / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load(untied)


def test_dtypes_are_taken_by_name_and_as_they_are(tmp_path):
    jax_backtrack.save(tiny.model(vocab_size=320), small_tokenizer(), tmp_path / "out")
    for given in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), jax.numpy.zeros((), "bfloat16").dtype):
        assert load(tmp_path / "out", dtype=given)[0].embedding_VxM.dtype == jnp.bfloat16
    for given in ("int8", np.int8, np.dtype("float16"), None, 3):
        with pytest.raises(InputError, match=r"dtype .*: (did you mean|known are)"):
            load(tmp_path / "out", dtype=given)


def test_a_folder_in_the_place_of_the_weights_is_named(untied):
    (untied / SINGLE_FILE).unlink()
    (untied / SINGLE_FILE).mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read as safetensors"):
        port(untied)
    (untied / INDEX_FILE).mkdir()
    with pytest.raises(InputError, match="is not an index"):
        port(untied)


@pytest.mark.parametrize("path", ["~nobody_of_this_name/x", "x" * 300])
def test_a_path_that_cannot_be_looked_at_is_named(path):
    with pytest.raises(InputError, match="no path that can be looked at"):
        load(path)


@pytest.mark.parametrize("path", ["./nothing", "nothing", "/nothing/at/all", "no/such.gguf"])
def test_a_path_to_nothing_is_named(path):
    with pytest.raises(InputError, match="no such file"):
        load(path)
