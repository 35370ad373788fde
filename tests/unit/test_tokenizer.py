"""A tokenizer folder is read as its tokenizer.json says, or the gate reports the difference before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.tokenizer import PROBE, decode, encode, load_tokenizer, read_tokenizer, write_for_server
from tropd_mcore.data.tokenizer_gate import check_server_tokenizer, check_tokenizer, expected_text, server_probe
from tropd_mcore.errors import DataError, GateError
from tropd_mcore.mcore.verification import sample_sequences
from tropd_mcore.teacher.vocabulary import read_vocabulary

TEXT = "What is 2 + 3?\nAnswer in one line."
CORPUS = ["What is 2 + 3? Answer in one line.", "Add 4 and 5.\nThe answer is 9."] * 20
CLASSES = ("LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", None)


def byte_level(*, normalizer: Any = None) -> Tokenizer:
    """A trained byte-level BPE with two added tokens, of which one takes the white space behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2 has it: a space before the text and for every space a letter of its own, bytes for the rest."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {"▁": 259, "▁▁": 260, "a": 261, "i": 262}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "▁")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, model_type: str = "llama", **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    given = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": "{{ messages }}"} | settings
    text = json.dumps({name: value for name, value in given.items() if value is not None})
    (folder / "tokenizer_config.json").write_text(text)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    return folder


def ids_of_the_file(folder: Path, text: str) -> list[int]:
    """By the tokenizers library alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_over_a_byte_level_file_gives_the_ids_of_the_file(
    tmp_path: Path, model_type: str, name: str
) -> None:
    folder = write(tmp_path, byte_level(), model_type, tokenizer_class=name)
    loaded = check_tokenizer(folder, key="student.path")
    for text in (TEXT, *PROBE, "a<|end|> \n b <tool> c", "<unk><|endoftext|>"):
        assert encode(loaded.tokenizer, text) == ids_of_the_file(folder, text)
    assert decode(loaded.tokenizer, encode(loaded.tokenizer, TEXT)) == TEXT
    assert loaded.tokenizer.get_vocab() == byte_level().get_vocab()
    assert loaded.tokenizer.chat_template == "{{ messages }}" and loaded.tokenizer.eos_token == "<eos>"
    renderer = Renderer(folder)
    assert renderer.prompt_ids(TEXT).tolist()[-13:] == ids_of_the_file(folder, TEXT)
    assert renderer.decode(renderer.prompt_ids(TEXT)) == TEXT


def test_transformers_alone_loses_the_spaces_of_a_byte_level_folder(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path, byte_level(), tokenizer_class="LlamaTokenizerFast")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT.replace(" ", "").replace(
        "\n", ""
    )


def test_a_corrected_tokenizer_is_reported_with_its_class_and_the_first_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = write(tmp_path / "wrong", byte_level(), tokenizer_class="LlamaTokenizerFast")
    right = write(tmp_path / "right", byte_level(), tokenizer_class="PreTrainedTokenizerFast")
    with caplog.at_level(logging.WARNING):
        check_tokenizer(right, key="teacher.path")
        assert not caplog.records
        check_tokenizer(wrong, key="teacher.path")
    assert "teacher.path: " in caplog.text and "rebuilds the tokenizer as LlamaTokenizer" in caplog.text
    assert "token '<unk>' (id 292) is not in the file" in caplog.text


def test_every_reader_of_the_project_reads_the_same_tokenizer(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(), tokenizer_class="LlamaTokenizerFast")
    assert read_vocabulary(folder) == byte_level().get_vocab()
    (_, ids), *_ = [entry for entry in sample_sequences(folder, 292, seed=0) if entry[0].startswith("text")]
    assert decode(load_tokenizer(folder), ids.tolist()).startswith("A train leaves at 9:40 and arrives")


def test_special_tokens_are_not_split_whatever_the_settings(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(), tokenizer_class="PreTrainedTokenizerFast", split_special_tokens=True)
    loaded = check_tokenizer(folder, key="student.path")
    assert encode(loaded.tokenizer, "a<|end|>") == ids_of_the_file(folder, "a<|end|>")
    assert len(encode(loaded.tokenizer, "<|end|>")) == 1


def test_a_length_limit_in_the_file_cuts_no_prompt(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    folder = write(tmp_path, tokenizer, tokenizer_class="LlamaTokenizerFast")
    loaded = check_tokenizer(folder, key="student.path")
    assert decode(loaded.tokenizer, encode(loaded.tokenizer, TEXT * 9)) == TEXT * 9


def test_a_normalizer_changes_the_text_once_and_the_gate_expects_exactly_that_text(tmp_path: Path) -> None:
    composed = "\u00e9"
    folder = write(tmp_path / "nfc", byte_level(normalizer=normalizers.NFC()), "qwen3", tokenizer_class=None)
    loaded = check_tokenizer(folder, key="student.path")
    assert loaded.file is not None and expected_text(loaded.file, "e\u0301") == composed
    assert decode(loaded.tokenizer, encode(loaded.tokenizer, "e\u0301")) == composed

    lower = write(tmp_path / "lower", byte_level(normalizer=normalizers.Lowercase()), tokenizer_class=None)
    assert check_tokenizer(lower, key="student.path").file is not None


def test_a_tokenizer_converted_from_sentencepiece_passes_with_its_spaces(tmp_path: Path) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = write(tmp_path, sentencepiece_like(), tokenizer_class="LlamaTokenizer", **special)
    loaded = check_tokenizer(folder, key="student.path")
    assert loaded.correction is not None and "'  two  spaces" in loaded.correction
    assert decode(loaded.tokenizer, encode(loaded.tokenizer, "  two  spaces")) == "  two  spaces"


def test_decoding_never_cleans_up_spaces(tmp_path: Path) -> None:
    destroy = {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    }
    folder = write(tmp_path, byte_level(), tokenizer_class="PreTrainedTokenizerFast", **destroy)
    text = "Is it 2 , 3 ? No !"
    renderer = Renderer(folder)
    ids = ids_of_the_file(folder, text)
    assert AutoTokenizer.from_pretrained(folder).decode(ids) != text
    assert renderer.decode(ids) == text and "".join(renderer.token_texts(ids)) == text


def test_a_file_that_loses_text_by_itself_is_refused_by_the_gate(tmp_path: Path) -> None:
    tokenizer = byte_level()
    content = json.loads(tokenizer.to_str())
    content["decoder"] = None
    folder = write(tmp_path, Tokenizer.from_str(json.dumps(content)), tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(GateError, match=r"gates\.tokenizer: teacher\.path=.*'What is 2 \+ 3\?\\nAnswer.*comes back as"):
        check_tokenizer(folder, key="teacher.path")


def test_text_that_a_small_tokenizer_cannot_encode_is_reported_and_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    characters = sorted({character for text in PROBE[:2] for character in text} | {"\u2581"})
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    folder = write(tmp_path, tokenizer, tokenizer_class="PreTrainedTokenizerFast", unk_token="<unk>", bos_token=None)
    with caplog.at_level(logging.WARNING):
        check_tokenizer(folder, key="student.path")
    assert "student.path: the tokenizer has no tokens for parts of 11 of 13 probe texts" in caplog.text


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_token_that_only_the_settings_name_is_appended_and_reported(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    added = {"292": {"content": "<later>", "special": True}}
    folder = write(tmp_path, byte_level(), tokenizer_class=name, pad_token="[PAD]", added_tokens_decoder=added)
    with caplog.at_level(logging.WARNING):
        vocabulary = check_tokenizer(folder, key="student.path").tokenizer.get_vocab()
    assert {token: vocabulary[token] for token in vocabulary if vocabulary[token] >= 292} == {
        "<later>": 292,
        "[PAD]": 293,
    }
    assert (
        "tokenizer.json lacks 2 tokens that other files of the folder name ('<later>' 292, '[PAD]' 293)" in caplog.text
    )


def test_a_token_to_which_the_settings_give_another_id_is_refused_by_the_gate(tmp_path: Path) -> None:
    added = {"400": {"content": "<later>", "special": True}}
    folder = write(tmp_path, byte_level(), tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder=added)
    with pytest.raises(GateError, match=r"gives id 400 to token '<later>', which gets 292; fix tokenizer_config\.json"):
        check_tokenizer(folder, key="student.path")


@pytest.mark.parametrize("part", ["model", "pre_tokenizer", "decoder"])
def test_a_tokenizer_file_of_a_later_release_gives_one_line_that_says_what_to_install(
    tmp_path: Path, part: str
) -> None:
    folder = write(tmp_path, byte_level(), tokenizer_class="PreTrainedTokenizerFast")
    content = json.loads((folder / "tokenizer.json").read_text())
    content[part]["type"] = "OfALaterRelease"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for reader in (Renderer, read_vocabulary, read_tokenizer):
        with pytest.raises(
            DataError, match=r"tokenizer\.json: the installed tokenizers \d+\.\d+\.\S+ cannot read"
        ) as error:
            reader(folder)
        assert "install the release" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_and_a_damaged_file_are_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, byte_level(), tokenizer_class="PreTrainedTokenizerFast")
    content = (folder / name).read_bytes()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=rf"{name}: expected a file of the tokenizer; found a Git LFS pointer; fetch"):
        load_tokenizer(folder)
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{name}: damaged, cannot be read as JSON"):
        load_tokenizer(folder)


def test_a_folder_with_only_a_sentencepiece_model_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match=r"expected a tokenizer there \(tokenizer\.json\); .*save a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_code_of_a_tokenizer_folder_is_not_run_and_no_prompt_is_shown(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(), "no_such_model", tokenizer_class="Strange")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["strange.Strange", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="contains custom code"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_tokenizer_json_is_reported_as_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    byte_level().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with caplog.at_level(logging.WARNING), pytest.raises(GateError, match="comes back as"):
        check_tokenizer(tmp_path, key="student.path")  # it normalizes to NFC, which no file says
    assert "no tokenizer.json" in caplog.text


def test_a_server_gets_tokenizer_files_that_a_plain_reader_reads_as_we_do(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", byte_level(), tokenizer_class="LlamaTokenizerFast")
    loaded = read_tokenizer(folder)
    written = write_for_server(loaded, folder, tmp_path / "served")
    assert written == tmp_path / "served"
    plain = AutoTokenizer.from_pretrained(written)
    assert [encode(plain, text) for text in PROBE] == [encode(loaded.tokenizer, text) for text in PROBE]
    assert plain.eos_token_id == loaded.tokenizer.eos_token_id and plain.chat_template == "{{ messages }}"
    right = write(tmp_path / "right", byte_level(), tokenizer_class="PreTrainedTokenizerFast")
    assert write_for_server(read_tokenizer(right), right, tmp_path / "other") is None
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("lie", "difference"),
    [
        (lambda ids: [ids[0], 7, *ids[2:]], r"id 1, 7 instead of \d+"),
        (lambda ids: ids[:-1], "the number of ids"),
        (lambda ids: [], "the number of ids"),
    ],
)
def test_a_server_with_another_tokenizer_is_refused_with_the_first_difference(
    tmp_path: Path, lie: Any, difference: str
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = read_tokenizer(tmp_path)
    honest = [encode(loaded.tokenizer, text) for text in server_probe(loaded)]
    check_server_tokenizer("teacher.server", "http://x", loaded, honest)
    lying = [*honest[:2], lie(honest[2]), *honest[3:]]
    with pytest.raises(GateError, match=rf"gates\.tokenizer: teacher\.server: the server at http://x .* {difference}"):
        check_server_tokenizer("teacher.server", "http://x", loaded, lying)
