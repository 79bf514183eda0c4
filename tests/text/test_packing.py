"""Token batches: what a text gives, and what is refused."""

import hashlib
import json
import types

import pytest
import torch
from words import BOS, EOS, WORDS, assert_refused, split_amount, word_tokenizer, words

from moefy.errors import MoefyError
from moefy.text import documents, packing
from moefy.text.documents import Document
from moefy.text.windows import overlap, text_windows

SIZES = {"num_tokens": 400, "length": 100}


@pytest.fixture
def save(tmp_path):
    """Write documents as a text file, give its path as the command line would."""

    def write(texts, name="text.txt"):
        path = tmp_path / name
        path.write_text("\n\n\n".join(texts), encoding="utf-8")
        return str(path)

    return write


def one_word_documents(num, size):
    """Document n says only `w<n>`, so that every token tells its document."""
    return [words(*[n] * size) for n in range(num)]


def load(source, tokenizer=None, **changes):
    amount, options = split_amount({"num_tokens": 256, "length": 16} | changes)
    return packing.load(tokenizer or word_tokenizer(), source, amount, **options)


def said(ids_BT):
    """The documents that ids come from, if they are `one_word_documents`."""
    return set(ids_BT.flatten().tolist()) - {BOS, EOS}


# Documents


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n\nb\n", ["a", "b"]),
        ("a\n\nb\n", ["a\n\nb"]),
        ("a\n\n\n\n\n\n\nb", ["a", "b"]),
        ("\n\n\na\n\n\n", ["a"]),
        ("a\r\n\r\n\r\nb", ["a", "b"]),
        ("\ufeffa", ["a"]),
        ("  a\n\tb  ", ["  a\n\tb  "]),
    ],
)
def test_two_blank_lines_separate_documents(tmp_path, text, expected):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    assert list(documents.documents(str(path))) == expected


def test_jsonl_gives_the_named_field_and_skips_blank_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "title": "A"}, {"text": None, "title": "B"}, {"text": " ", "title": "C"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert list(documents.documents(str(path))) == ["a"]
    assert list(documents.documents(str(path), text_field="title")) == ["A", "B", "C"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}', encoding="utf-8")
    assert list(documents.documents(str(path))) == ["a?b"]


def test_a_folder_is_its_text_files_sorted_by_path(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in [("b.md", "2"), ("a.txt", "1"), ("sub/c.txt", "4"), ("empty.txt", "")]:
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "3"}', encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    assert list(documents.documents(str(tmp_path))) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("name:test", ("name", None, "test")),
        ("name:small:test", ("name", "small", "test")),
    ],
)
def test_other_names_are_streamed_data_sets(monkeypatch, source, arguments):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, configuration, *, split, streaming):
        assert (name, configuration, split) == arguments and streaming
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents.documents(source)) == ["a", "b"]
    with pytest.raises(MoefyError, match="no field 'body'; the fields are 'text'"):
        list(documents.documents(source, text_field="body"))


def test_a_data_set_that_is_not_there_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("no such thing\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert_refused(lambda: list(documents.documents("name")), "read (no such thing)")


def test_without_datasets_the_install_line_is_shown(monkeypatch):
    found = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda _: None))
    monkeypatch.setattr(documents, "importlib", found)
    assert_refused(lambda: list(documents.documents("name")), "pip install datasets")


# Faults


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("empty.txt", b"", ["no text"]),
        ("blank.txt", b" \n\n\n \n", ["no text"]),
        ("binary.txt", b"abc\0def", ["binary", "byte 3 "]),
        ("latin.txt", b"caf\xe9 au lait", ["not UTF-8 at byte 3;"]),
        ("cut.txt", "é".encode()[:1], ["not UTF-8 at byte 0;"]),
        ("far.txt", b"a" * (2**20 - 1) + b"\xc3\xff", [f"not UTF-8 at byte {2**20 - 1};"]),
        ("utf16.txt", "text".encode("utf-16"), ["binary"]),
        ("broken.jsonl", b'{"text": "a"}\n\n{"text": ', ["line 3: not valid JSON"]),
        ("deep.jsonl", b"[" * 10**5, ["row 1: not valid JSON"]),
        ("list.jsonl", b'["a"]', ["row 1", "the row is str; expected an object"]),
        ("other.jsonl", b'{"body": "a", "id": 1}', ["'text'", "the fields are 'body', 'id'"]),
        ("number.jsonl", b'{"text": 1}', ["holds int; expected a string"]),
        ("nothing.jsonl", b'{"text": ""}\n{"text": null}', ["2 documents or rows and no text"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, fragments):
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(lambda: load(str(path)), name, *fragments)


@pytest.mark.parametrize("source", ["./no.txt", "/no/such", "no.jsonl", "a/b/c", "~/no/such"])
def test_a_path_that_is_not_there_is_no_data_set(source):
    assert_refused(lambda: load(source), source, "no such file or folder")


def test_an_empty_folder_names_the_files_it_looks_for(tmp_path):
    assert_refused(lambda: load(str(tmp_path)), ".txt, .md, .json, .jsonl, .ndjson, .parquet")


def test_a_character_cut_by_the_block_is_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * (2**20 - 1) + "é".encode())
    assert len(next(documents.documents(str(path)))) == 2**20


# Packing


def test_shape_and_digest(save):
    tokens = load(save(one_word_documents(40, 20)), num_tokens=330, length=16)
    assert tokens.ids_BT.shape == (20, 16) and tokens.ids_BT.dtype == torch.int64
    assert tokens.num_heldout == round(20 / 8)
    assert tokens.sha256 == hashlib.sha256(tokens.ids_BT.numpy().tobytes()).hexdigest()
    assert tokens.notes == ()


def test_the_seed_decides(save):
    source = save(one_word_documents(100, 20))
    assert load(source).sha256 == load(source).sha256
    assert load(source).sha256 != load(source, seed=1).sha256


@pytest.mark.parametrize("eos", [True, False])
def test_documents_are_whole_and_separated_by_eos(save, eos):
    texts = [words(n, n + 1, n + 2) for n in range(0, 900, 3)]
    tokens = load(save(texts), word_tokenizer(eos=eos))
    stream = tokens.ids_BT[: -tokens.num_heldout].flatten().tolist()
    step = 4 if eos else 3
    for at in range(0, len(stream) - step, step):
        first = stream[at]
        assert stream[at : at + step] == [first, first + 1, first + 2] + [EOS] * eos


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_there_if_the_tokenizer_adds_it(save, adds_bos):
    tokens = load(save(one_word_documents(40, 20)), word_tokenizer(adds_bos=adds_bos))
    assert tokens.ids_BT.shape == (16, 16)
    assert bool((tokens.ids_BT[:, 0] == BOS).all()) == adds_bos
    assert not (tokens.ids_BT[:, 1:] == BOS).any()


@pytest.mark.parametrize("heldout", [0.0, 1 / 8, 0.5, 1.0])
@pytest.mark.parametrize("size", [5, 20, 70])
def test_heldout_documents_are_their_own(save, heldout, size):
    tokens = load(save(one_word_documents(100, size)), heldout=heldout)
    fit_BT, heldout_BT = tokens.ids_BT[: -tokens.num_heldout], tokens.ids_BT[-tokens.num_heldout :]
    assert len(fit_BT) >= 1 and len(heldout_BT) >= 1
    assert said(fit_BT) and said(heldout_BT) and not said(fit_BT) & said(heldout_BT)
    assert tokens.num_documents == len(said(tokens.ids_BT))
    assert tokens.notes == ()


def test_one_book_works_in_the_order_of_its_pages(save):
    tokens = load(save([words(*range(WORDS))]))
    assert tokens.ids_BT.flatten().tolist()[:224] == list(range(3, 227))
    assert tokens.num_documents == 1
    assert any("share a document" in note for note in tokens.notes)


def test_a_long_document_does_not_dominate(save):
    long, short = words(*[0] * 5000), one_word_documents(60, 10)[1:]
    for seed in range(5):
        ids_BT = load(save([long, *short]), seed=seed).ids_BT
        assert (ids_BT == 3).sum() <= 4 * 16
    # It is come back to when the others have run out.
    tokens = load(save([long, *short[:3]]))
    assert (tokens.ids_BT == 3).sum() > 4 * 16
    assert len(said(tokens.ids_BT)) == 4


def test_a_document_read_in_parts_is_the_document():
    numbers = [n * 7 % WORDS for n in range(5000)]
    for share in (8, 16, 64, 10000):
        parts = list(packing._shares(word_tokenizer(), Document(words(*numbers)), share))
        assert [token - 3 for ids in parts for token in ids] == numbers
        assert all(len(ids) == share for ids in parts[:-1])


def test_a_smaller_text_gives_fewer_sequences_and_says_so(save):
    tokens = load(save(one_word_documents(20, 9)), num_tokens=10_000)
    assert tokens.ids_BT.shape == (200 // 16, 16)
    assert tokens.notes[0] == "asked for 10,000 tokens, the text gave 200"


def test_a_text_of_fewer_than_8_sequences_is_refused(save):
    num_tokens = 8 * 16
    assert len(load(save([words(*range(num_tokens - 1))])).ids_BT) == 8  # and its eos
    source = save([words(*range(num_tokens - 2))])
    assert_refused(lambda: load(source), "127 tokens", "7 sequences of 16", "at least 8")


@pytest.mark.parametrize("changes", [{"num_tokens": 127}, {"length": 1}, {"length": 0}])
def test_a_request_of_fewer_than_8_sequences_is_a_usage_error(save, changes):
    source = save(one_word_documents(20, 20))
    assert_refused(lambda: load(source, **changes), "at least 8 sequences", code=2)


def test_duplicates_are_used_once_and_noted(save):
    texts = one_word_documents(40, 20)
    tokens = load(save(texts + texts[:3]))
    assert tokens.notes == ("3 of 43 documents are duplicates, not used",)
    assert tokens.sha256 == load(save(texts)).sha256


def test_a_text_beyond_the_limit_is_read_in_part_and_noted(save, monkeypatch):
    source = save(one_word_documents(100, 20))
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 3000)
    tokens = load(source)
    assert max(said(tokens.ids_BT)) < 60
    assert "only the first" in tokens.notes[0]


def test_ids_without_an_embedding_are_refused(save):
    source = save(one_word_documents(40, 20))
    load(source, vocab_size=43)
    assert_refused(lambda: load(source, vocab_size=42, num_tokens=800), "id 42", "42 embeddings")


# Evaluation windows


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("num_words", [64, 100, 163, 164, 200, 999])
def test_windows_are_consecutive_and_the_last_has_64_tokens(save, adds_bos, num_words):
    tokenizer = word_tokenizer(adds_bos=adds_bos)
    path = save([words(*range(num_words))])
    windows = text_windows(tokenizer, path, num_tokens=500, length=100)
    bos = [BOS] * adds_bos
    expected, rest = [], list(range(3, 3 + min(num_words, 500)))
    while len(bos + rest) >= 64:
        expected.append(bos + rest[: 100 - len(bos)])
        rest = rest[100 - len(bos) :]
    assert [window_T.tolist() for window_T in windows] == expected
    assert all(window_T.dtype == torch.int64 for window_T in windows)


def test_windows_read_no_further_than_8_characters_per_token(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"w1 " * 2**20 + b"\xff")
    (window_T,) = text_windows(word_tokenizer(), path, num_tokens=100, length=100)
    assert window_T.tolist() == [4] * 100
    # The tokens run out before the characters only if words are short.
    path.write_bytes(b"w1 " * 40 + b" " * 10_000 + b"w2 " * 60)
    assert_refused(
        lambda: text_windows(word_tokenizer(), path, num_tokens=100, length=100),
        "40 tokens",
        "at least 64",
    )


def test_windows_refuse_what_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"w1 " * 90 + b"\xff")
    options = {"num_tokens": 100, "length": 100}
    faults = [(path, "byte 270;"), (tmp_path / "no", "no such file"), (tmp_path, "a folder")]
    for file, fragment in faults:
        assert_refused(lambda file=file: text_windows(None, file, **options), fragment)


def test_overlap_finds_the_calibration_text_in_the_evaluation_text(save):
    apart = text_windows(word_tokenizer(), save([words(*range(500, 900))]), **SIZES)
    within = text_windows(word_tokenizer(), save([words(*range(60, 260))]), **SIZES)
    ids_BT = torch.arange(3, 403).view(4, 100)
    assert overlap(ids_BT, apart) == 0
    assert 0.5 < overlap(ids_BT, within) < 1  # pieces across two sequences are not found
    assert overlap(ids_BT, list(ids_BT)) == 1


# Kinds of text


def test_stratified_text_has_the_shares_of_the_whole(save):
    digits = [str(3**n)[:90] for n in range(200, 260)]
    texts = [words(*range(n, n + 20)) for n in range(0, 600, 4)] + digits
    tokenizer = word_tokenizer()
    whole = sum(len(text) for text in digits) / sum(map(len, texts))

    def share(seed, *, stratify):
        """Of what comes first, how many characters are in digits, which are unknown words here."""
        source = save(texts)
        order, _ = documents.shuffled(source, 256, seed)
        if stratify:
            order = documents.stratified(order, 256, share=64)
        first = [document.text for document in order[:24]]
        return sum(len(t) for t in first if " " not in t) / sum(map(len, first))

    assert all(abs(share(seed, stratify=True) - whole) < 0.05 for seed in range(6))
    assert any(abs(share(seed, stratify=False) - whole) > 0.05 for seed in range(6))
    loaded = [load(save(texts), tokenizer, stratify=flag) for flag in (True, False, True)]
    assert loaded[0].sha256 == loaded[2].sha256 != loaded[1].sha256


def test_of_long_documents_only_what_counts_decides_how_many_are_looked_at():
    digits, prose = (
        [str(3**n) for n in range(2000, 2020)],
        [words(*range(n, 900)) for n in range(80)],
    )
    texts = [text * 64 for text in prose + digits]  # three of these are more than is looked at
    found = documents.stratified([Document(text) for text in texts], 2048, share=256)
    order = [document.text for document in found]
    assert sum(" " not in text for text in order[:20]) in (3, 4, 5)
    assert sum(" " not in text for text in texts[:20]) == 0


def test_texts_behind_what_gives_enough_stay_there():
    texts = [str(3**n) if n % 5 else words(*range(n, 300)) for n in range(100, 300)]
    ends = [sum(len(text) for text in texts[: n + 1]) for n in range(len(texts))]
    num = sum(end <= documents.KIND_CHARACTERS_PER_TOKEN * 64 for end in ends)
    found = documents.stratified([Document(text) for text in texts], 64, share=10**6)
    order = [document.text for document in found]
    assert 2 * 16 <= num < len(texts)
    assert order[num:] == texts[num:] and order[:num] != texts[:num]
    assert sorted(order) == sorted(texts)
