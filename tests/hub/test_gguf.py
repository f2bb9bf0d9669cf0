"""Headers of .gguf files that are not what they should be; real weights are read in test_smollm."""

import struct

import gguf
import pytest

from jax_backtrack.errors import InputError
from jax_backtrack.hub.gguf import GGUFFile


def write_gguf(path, **fields):
    """A file with metadata alone, for each a type of gguf's and a value."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, value) in fields.items():
        writer.add_key_value(name.replace("__", "."), value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


TEXT, NUMBER, LIST = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.ARRAY
TOKENIZER = dict(
    tokenizer__ggml__model=(TEXT, "gpt2"),
    tokenizer__ggml__pre=(TEXT, "smollm"),
    tokenizer__ggml__tokens=(LIST, ["a", "b", "ab"]),
    tokenizer__ggml__token_type=(LIST, [1, 1, 1]),
    tokenizer__ggml__merges=(LIST, ["a b"]),
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tokenizer__ggml__tokens=(NUMBER, 3)), "'tokenizer.ggml.tokens' is 3, no list"),
        (dict(tokenizer__ggml__tokens=(LIST, [1, 2])), "'tokenizer.ggml.tokens' holds 1, no str"),
        (dict(tokenizer__ggml__tokens=(LIST, ["a", "a"])), "has a token twice"),
        (dict(tokenizer__ggml__model=(LIST, ["gpt2"])), r"'tokenizer.ggml.model' is \['gpt2'\], no str"),
        (dict(tokenizer__ggml__token_type=(LIST, [1])), "its tokenizer cannot be built"),
        (dict(tokenizer__ggml__merges=(LIST, ["a c"])), "has the merge .*no token"),
        (dict(tokenizer__ggml__merges=(LIST, ["b a"])), "has the merge .*no token"),
        (dict(tokenizer__ggml__merges=(LIST, ["ab"])), "has the merge .*no token"),
        (dict(tokenizer__ggml__bos_token_id=(NUMBER, 9)), "its tokenizer cannot be built"),
        (dict(tokenizer__ggml__bos_token_id=(TEXT, "a")), "'tokenizer.ggml.bos_token_id' is 'a', no int"),
    ],
)
def test_metadata_of_gguf_that_is_not_what_it_should_be_is_named(tmp_path, fields, message):
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", **TOKENIZER | fields))
    with pytest.raises(InputError, match=message):
        file.tokenizer()


def test_metadata_of_gguf_that_is_no_text_is_named(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", general__type=(TEXT, "model"), **TOKENIZER)
    path.write_bytes(path.read_bytes().replace(b"smollm", b"\xffmollm"))
    with pytest.raises(InputError, match=r"'tokenizer\.ggml\.pre' cannot be read"):
        GGUFFile(path).tokenizer()


@pytest.mark.parametrize("count", [2**24, 2**63])
def test_a_count_in_gguf_that_reaches_behind_the_file_is_named(tmp_path, count):
    """GGUFReader alone reads on for as long as the count says, and keeps what it did not find."""
    path = write_gguf(tmp_path / "x.gguf", x=(LIST, [7, 7, 7]))
    held, lying = (struct.pack("<IQ", gguf.GGUFValueType.INT32, size) for size in (3, count))
    assert path.read_bytes().count(held) == 1
    path.write_bytes(path.read_bytes().replace(held, lying))
    with pytest.raises(InputError, match="cannot be read as gguf: it ends before its header says so"):
        GGUFFile(path)


def test_a_header_of_gguf_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_backtrack.hub.gguf._MOST_PARTS", 1000)
    GGUFFile(write_gguf(tmp_path / "small.gguf", x=(LIST, [7] * 900)))
    with pytest.raises(InputError, match="its header has more than 1,000 parts"):
        GGUFFile(write_gguf(tmp_path / "large.gguf", x=(LIST, [7] * 1000)))
