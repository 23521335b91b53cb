"""What the ids of a tokenizer stand for in running text: as many bytes as the text has, for real tokenizers."""

import json
import unicodedata
from pathlib import Path

import pytest
from clients import AWKWARD
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from halny.model.data.tokenizer import mistral_tokenizer
from halny.model.tokenizer_files import BYTE_LEVEL, is_byte_level, spelled, unknown_id

POLISH = "Zażółć gęślą jaźń, a wiatr halny wieje z gór. Łódź płynie, źdźbło się chwieje, ćma śpi.\n"
TEXTS = [POLISH, "def f(x):\n    return x ** 2\n", "🦙 and 👩\u200d👩\u200d👧", *AWKWARD]


def saved(tokenizer: Tokenizer, folder: Path, **named: str) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def byte_level(nested: bool = False, n: int = 300, texts: list[str] | None = None) -> Tokenizer:
    """Trained on the spot; few merges, so that most Polish letters are two pieces. nested: inside Sequences only."""
    tokenizer = Tokenizer(models.BPE())
    split, level = pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if nested else level
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()]) if nested else decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts or [POLISH] * 8, trainer)
    return tokenizer


@pytest.mark.parametrize("nested", [False, True])
def test_bytes_of_the_ids_of_a_byte_level_bpe_are_those_of_the_text(tmp_path, nested):
    tokenizer = byte_level(nested)
    folder = saved(tokenizer, tmp_path)
    spells = spelled(folder)
    assert is_byte_level(folder)
    assert spells.keys() == set(range(300)) - {0, 1}
    for text in TEXTS:
        ids = tokenizer.encode(text.replace("<s>", "").replace("</s>", "")).ids
        assert b"".join(spells[i] for i in ids) == text.replace("<s>", "").replace("</s>", "").encode()
    assert any(len(spells[i]) == 1 and spells[i] > b"\x7f" for i in tokenizer.encode("ó🦙").ids)  # parts of characters


def test_bytes_of_mistrals_ids_are_those_of_the_text_and_the_space_before_it(tmp_path):
    for name, content in mistral_tokenizer().files.items():
        (tmp_path / name).write_bytes(content)
    tokenizer, spells = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), spelled(tmp_path)
    assert not is_byte_level(tmp_path) and spells.keys() == set(range(3, 32000)) and unknown_id(tmp_path) == 0
    assert (spells[3], spells[258], spells[259], spells[28741]) == (b"\0", b"\xff", b"  ", b"A")
    tokenizer.encode_special_tokens = True  # as text
    for text in TEXTS:
        if "▁" not in text:  # which SentencePiece reads as a space
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert b"".join(spells[i] for i in ids) == b" " + text.encode()


def test_bytes_of_a_unigram_model(tmp_path):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Metaspace(), normalizers.NFC()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([POLISH] * 8, trainer)
    spells = spelled(saved(tokenizer, tmp_path))
    assert 0 not in spells and 1 not in spells and unknown_id(tmp_path) == 0
    ids = tokenizer.encode(POLISH.strip()).ids
    assert b"".join(spells[i] for i in ids) == b" " + unicodedata.normalize("NFC", POLISH.strip()).encode()


def test_added_tokens_stand_for_themselves_unless_they_are_special(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens(["źdźbło", AddedToken("<tag>", special=False)])
    tokenizer.add_special_tokens(["<|end|>"])
    spells = spelled(saved(tokenizer, tmp_path))
    assert (spells[300], spells[301]) == ("źdźbło".encode(), b"<tag>") and 302 not in spells


def test_an_added_token_that_is_a_piece_of_the_model_spells_as_the_piece_does(tmp_path):
    """As in Gemma's tokenizer.json, where runs of spaces are listed among the added tokens too."""
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "▁▁": 2}, [("▁", "▁")], unk_token="<unk>"))
    tokenizer.add_tokens(["▁▁"])
    assert spelled(saved(tokenizer, tmp_path)) == {1: b" ", 2: b"  "}


def test_kinds_that_spell_in_another_way_say_nothing(tmp_path):
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    clip = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    for i, tokenizer in enumerate((wordpiece, clip)):
        assert spelled(saved(tokenizer, tmp_path / str(i))) == {}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text('{"model": [')
    assert spelled(None) == spelled(tmp_path / "nowhere") == spelled(tmp_path / "broken") == {}


def test_the_alphabet_is_the_librarys():
    assert set(BYTE_LEVEL) == set(pre_tokenizers.ByteLevel.alphabet()) and set(BYTE_LEVEL.values()) == set(range(256))
    assert BYTE_LEVEL["Ġ"] == ord(" ") and BYTE_LEVEL["Ċ"] == ord("\n") and BYTE_LEVEL["Å"] == 0xC5
