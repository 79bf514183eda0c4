"""Rows in every container, conversations in every form, and what is refused: by every reader."""

import gzip
import json
import pickle
import sys
import types
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from words import BOS, EOS, assert_refused, split_amount, word_tokenizer, words

from moefy import cli
from moefy.config import report
from moefy.config.toml import read_toml
from moefy.errors import MoefyError
from moefy.evaluate.prompts import likelihood, read_prompts
from moefy.text import chat, documents, packing, rows
from moefy.text.windows import text_windows

ROWS = [{"text": words(*range(n, n + 20)), "id": n} for n in range(0, 800, 20)]
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def json_lines(values):
    return "\n".join(json.dumps(value) for value in values).encode() + b"\n"


def json_array(values, **options):
    return json.dumps(values, **options).encode()


def parquet_bytes(values):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(values), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


CONTAINERS = {
    "a.jsonl": json_lines,
    "A.JSONL": json_lines,
    "a.ndjson": json_lines,
    "lines.json": json_lines,
    "lines.txt": json_lines,
    "noname": json_lines,
    "array.json": json_array,
    "array.jsonl": json_array,
    "array.txt": json_array,
    "pretty.json": lambda values: json_array(values, indent=2),
    "pretty.txt": lambda values: b"\n \n" + json_array(values, indent=2),
    "objects.json": lambda values: b"\n".join(json.dumps(v, indent=1).encode() for v in values),
    "objects.txt": lambda values: b"\n".join(json.dumps(v, indent=1).encode() for v in values),
    "windows.jsonl": lambda values: json_lines(values).replace(b"\n", b"\r\n\r\n"),
    "mark.jsonl": lambda values: BYTE_ORDER_MARK + json_lines(values),
    "mark.json": lambda values: BYTE_ORDER_MARK + json_array(values),
    "mark.txt": lambda values: BYTE_ORDER_MARK + json_array(values),
    "a.jsonl.gz": lambda values: gzip.compress(json_lines(values), mtime=0),
    "a.json.gz": lambda values: gzip.compress(json_array(values), mtime=0),
    "a.txt.gz": lambda values: gzip.compress(json_lines(values), mtime=0),
    "unnamed.jsonl": lambda values: gzip.compress(json_lines(values), mtime=0),
    "two.jsonl.gz": lambda values: b"".join(
        gzip.compress(json_lines([v]), mtime=0) for v in values
    ),
    "a.parquet": parquet_bytes,
    "parquet.txt": parquet_bytes,
    "a.parquet.gz": lambda values: gzip.compress(parquet_bytes(values), mtime=0),
}
containers = pytest.mark.parametrize("name", CONTAINERS)


def stored(tmp_path, name, values):
    file = tmp_path / name
    file.write_bytes(CONTAINERS[name](values))
    return file


def calibrated(file, tokenizer=None, **options):
    amount, options = split_amount({"num_tokens": 256, "length": 16} | options)
    return packing.load(tokenizer or word_tokenizer(), str(file), amount, **options).ids_BT.tolist()


def scored(file, tokenizer=None, **options):
    options = {"num_tokens": 500, "length": 100} | options
    windows = text_windows(tokenizer or word_tokenizer(), file, **options)
    return [window_T.tolist() for window_T in windows]


def prompted(file, tokenizer=None):
    return read_prompts(file, tokenizer or word_tokenizer())


# Containers


@containers
def test_the_same_rows_are_the_same_tokens_in_every_container(tmp_path, name):
    plain, other = stored(tmp_path, "a.jsonl", ROWS), stored(tmp_path, name, ROWS)
    assert list(documents.documents(str(other))) == [row["text"] for row in ROWS]
    assert calibrated(other) == calibrated(plain)
    assert scored(other) == scored(plain)
    assert [row for _, row in rows.rows(other)] == ROWS


@containers
def test_a_changed_row_is_seen_in_every_container(tmp_path, name):
    plain = stored(tmp_path, "a.jsonl", ROWS)
    before = calibrated(plain, num_tokens=800), scored(plain)
    changed = stored(tmp_path, name, [{"text": words(*[7] * 20)}, *ROWS[1:]])
    assert scored(changed) != before[1]
    assert calibrated(changed, num_tokens=800) != before[0]


@containers
def test_prompts_are_the_same_in_every_container(tmp_path, name):
    asked = [{"prompt": f"w{n}", "answer": None if n % 2 else "w1"} for n in range(9)]
    more = {"chat": False, "json": False}
    expected = [
        {**row, **more, "turns": [{"role": "user", "content": row["prompt"]}]} for row in asked
    ]
    assert prompted(stored(tmp_path, name, asked)) == expected


@containers
def test_rows_of_ids_are_the_same_in_every_container(tmp_path, name):
    held = [{"input_ids": list(range(n, n + 20)), "id": n} for n in range(30)]
    file = stored(tmp_path, name, held)
    assert [list(ids) for ids in documents.id_rows(str(file), "input_ids")] == [
        row["input_ids"] for row in held
    ]
    plain = stored(tmp_path, "a.jsonl", held)
    amount = packing.Amount(160, 16)
    assert packing.load_ids(str(file), amount).sha256 == packing.load_ids(str(plain), amount).sha256


def test_only_the_rows_of_ids_that_are_used_are_packed(tmp_path):
    """As if all were: `_pack` of every row gives the same sequences."""
    held = [{"input_ids": [n] * (1 + n % 50)} for n in range(600)]
    file = stored(tmp_path, "a.jsonl", held)
    for heldout in (1 / 8, 0.5, 1.0):
        tokens = packing.load_ids(str(file), packing.Amount(320, 20, 3, heldout))
        order = packing.torch.randperm(
            600, generator=packing.torch.Generator().manual_seed(3)
        ).tolist()
        parts = [held[index]["input_ids"] for index in order]
        num_fit = 16 - tokens.num_heldout
        ids_BT, num_documents, _ = packing.pack(parts, 20, num_fit, tokens.num_heldout)
        assert tokens.ids_BT.tolist() == ids_BT.tolist()
        assert tokens.num_documents == num_documents


def test_rows_of_ids_beyond_the_limit_are_not_read_and_noted(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json_lines([{"input_ids": [n] * 20} for n in range(60)]) + b"no JSON")
    amount = packing.Amount(160, 16)
    assert_refused(lambda: packing.load_ids(str(file), amount), "line 61: not valid JSON")
    monkeypatch.setattr(packing, "MOST_IDS", 400)
    tokens = packing.load_ids(str(file), amount)
    assert tokens.notes == ("only the first 400 ids were read",)
    assert int(tokens.ids_BT.max()) < 20


@pytest.mark.parametrize("ids", ["1", [1.0], [-1], [True], [2**31], [[1]], None, {}])
def test_what_are_no_ids_is_refused(tmp_path, ids):
    file = stored(tmp_path, "a.ndjson", [{"input_ids": [1] * 200}, {"input_ids": ids}])
    read = lambda: packing.load_ids(str(file), packing.Amount(128, 16))  # noqa: E731
    assert_refused(read, "line 2: 'input_ids' holds no list of token ids")


def test_a_folder_is_read_in_every_container(tmp_path):
    for number, name in enumerate(sorted(CONTAINERS)):
        stored(tmp_path, name, [{"text": f"w{number}"}])
    (tmp_path / "left.csv").write_text("text\nw0")
    (tmp_path / "left.py").write_text("w0 = 1")
    names = [name for name in sorted(CONTAINERS) if name != "noname"]
    result = list(documents.documents(str(tmp_path)))
    assert result == [f"w{sorted(CONTAINERS).index(name)}" for name in names]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_json_cut_into_blocks_is_what_it_is_whole(tmp_path_factory, values, block, indent, ascii):
    folder = tmp_path_factory.mktemp("blocks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", block)
        text = [json.dumps(value, indent=indent, ensure_ascii=ascii) for value in values]
        for name, content in (("l.json", "\n".join(text)), ("a.json", f"[{','.join(text)}]")):
            (folder / name).write_text(content, encoding="utf-8", errors="surrogatepass")
            try:
                content.encode()
            except UnicodeEncodeError:
                continue
            result = [row for _, row in rows.rows(folder / name)]
            assert repr(result) == repr(json.loads(f"[{','.join(text)}]"))


def test_a_long_value_is_tried_a_few_times_only(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 16)
    file = stored(tmp_path, "array.json", [{"text": "w" * 100_000}, {"text": "w1"}])
    with file.open() as stream:
        values, tried = rows._Values(stream), []
        decode = values.decode
        values.decode = lambda text, at: tried.append(len(text) - at) or decode(text, at)
        assert values.peek() == "["
        values.at += 1
        assert values.take("") == {"text": "w" * 100_000}
    assert sum(tried) < 4 * 100_000 and len(tried) > 5


def test_no_more_is_read_than_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 2**12)
    broken = json_lines(ROWS * 200) + b"\xff{"
    for name, content in {
        "a.jsonl": broken,
        "a.txt": broken,
        "a.json": b"[" + broken.replace(b"\n", b",\n"),
        "a.jsonl.gz": gzip.compress(broken, mtime=0),
        "text.txt": b"some words\n" * 2**17 + b"\xff",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert len(scored(tmp_path / name)) >= 5
        assert_refused(lambda name=name: calibrated(tmp_path / name), name)


def test_rows_stand_where_they_are_said_to(tmp_path):
    lines = stored(tmp_path, "a.jsonl", [{"text": "a\nb"}, {}])
    assert_refused(lambda: calibrated(lines), "a.jsonl, line 2: no field 'text'")
    apart = tmp_path / "apart.json"
    apart.write_text('\n{"text":\n"a"}\n\n\n{}')
    assert_refused(lambda: calibrated(apart), "apart.json, line 6: no field 'text'")
    array = stored(tmp_path, "pretty.json", [{"text": "a"}, {}])
    assert_refused(lambda: calibrated(array), "pretty.json, row 2: no field 'text'")
    table = stored(tmp_path, "a.parquet", [{"body": "a"}])
    assert_refused(lambda: calibrated(table), "a.parquet, row 1: no field 'text'", "'body'")


def test_a_row_of_many_fields_is_a_short_line(tmp_path):
    file = stored(tmp_path, "a.jsonl", [{f"{n}{'x' * 500}": n for n in range(5000)}])
    with pytest.raises(MoefyError) as caught:
        calibrated(file)
    assert len(str(caught.value)) < 700


# Text


TEXTS = [
    "[Chapter 1]\n\nIt was a quiet day.",
    "{\\bf LaTeX} begins so.",
    "{\n  int x = 1;\n}",
    '{"a": 1} is an object\nand this is not one.',
    '{"a": 1}\nis an object',
    '[{"a": 1}] is an array, and this goes on.',
    '{"never": "closed"',
    '{"cut": "o',
    "[1, 2, 3]",
    '["a", "b"]',
    "[[1, 2], [3, 4]]",
    "[]",
    "{}x",
    "[link](http://a.b) is Markdown",
    "[" * 3000,
    "name,text\n1,a\n2,b",
    "PARIS is a city",
    "<!DOCTYPE html><p>hello",
]


@pytest.mark.parametrize("content", TEXTS)
def test_text_that_begins_like_json_is_text(tmp_path, content):
    for name in ("a.txt", "a.md", "LICENSE", "a.tex"):
        (tmp_path / name).write_text(content)
        assert list(documents.documents(str(tmp_path / name))) == [content]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    assert list(documents.documents(str(tmp_path / "a.txt.gz"))) == [content]


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.NDJSON", "a.json.gz"])
def test_the_same_text_is_refused_where_rows_are_promised(tmp_path, name, content):
    content = content.encode()
    (tmp_path / name).write_bytes(
        gzip.compress(content, mtime=0) if name.endswith(".gz") else content
    )
    assert_refused(lambda: list(documents.documents(str(tmp_path / name))), name)
    assert_refused(lambda: scored(tmp_path / name), name)


@pytest.mark.parametrize("content", ['{"a": 1}', '[{"a": 1}]', '{"a": 1}\n{"b": 2}\nno JSON'])
def test_objects_are_never_running_text(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert_refused(lambda: calibrated(tmp_path / "a.txt"), "no field 'text'", "'a'")
    assert_refused(lambda: scored(tmp_path / "a.txt"), "no field 'text'", "'a'")


def readers(file):
    """What every command does with a file that the user names."""
    return [
        lambda: calibrated(file),
        lambda: scored(file),
        lambda: prompted(file),
        lambda: packing.load_ids(str(file), packing.Amount(128, 16)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"%PDF-1.7\nwords", "a PDF file"),
        ("a.jsonl", b"PK\x03\x04words", "a zip archive"),
        ("a.txt", pickle.dumps(["words"], 2), "a pickle"),
        ("a.json", pickle.dumps(["words"]), "a pickle"),
        ("a.jsonl.xz", b"\xfd7zXZ\0\0", "compressed by xz"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdwords", "compressed by zstd"),
        ("a.jsonl.bz2", b"BZh91AY&SY", "compressed by bzip2"),
        ("a.arrow", b"ARROW1\0\0", "an Arrow file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("a.pdf.gz", gzip.compress(b"%PDF-1.7\nwords", mtime=0), "a PDF file"),
        ("a.csv", b"id,text\n1,words", "a table (.csv)"),
        ("A.TSV", b"id\ttext\n1\twords", "a table (.tsv)"),
        ("a.csv.gz", gzip.compress(b"id,text\n1,words", mtime=0), "a table (.csv)"),
        ("a.jsonl", b"\x7fELF\0\0words", "binary (byte 4 is zero)"),
        ("a.parquet", b"words", "no parquet file"),
        ("a.parquet", b"PAR1words", "damaged parquet"),
    ],
)
def test_what_is_neither_text_nor_rows_is_refused_by_every_reader(tmp_path, name, content, says):
    if b"PAR1" in content:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    for read in readers(tmp_path / name):
        assert_refused(read, name, says)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.gz", gzip.compress(json_lines(ROWS), mtime=0)[:-30], "damaged gzip"),
        ("a.txt.gz", gzip.compress(b"w1 " * 999, mtime=0)[:-9] + b"x" * 9, "damaged gzip"),
        ("a.json", json_array(ROWS)[:-1], "cut off"),
        ("a.json", json_array(ROWS)[:-9], "row 40: not valid JSON"),
        ("a.json", json_array(ROWS) + b"[]", "text after the array"),
        ("a.json", json_array(ROWS).replace(b", {", b" {", 1), "row 1: not valid JSON"),
        ("a.jsonl", json_lines(ROWS)[:-9], "line 40: not valid JSON"),
        ("a.txt", "text".encode("utf-16"), "binary"),
        ("a.txt", b"words" * 2**18 + b"\0", f"byte {5 * 2**18} is zero"),
        ("a.txt", BYTE_ORDER_MARK + b"caf\xe9 au lait", "not UTF-8 at byte 6"),
        ("a.txt.gz", gzip.compress(b"caf\xe9 au lait", mtime=0), "not UTF-8 at byte 3"),
    ],
)
def test_what_is_damaged_is_refused_where_it_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert_refused(lambda: calibrated(tmp_path / name), name, says)
    assert_refused(lambda: scored(tmp_path / name, num_tokens=2**18), name, says)


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    file = stored(tmp_path, "a.jsonl", ROWS)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "open", refuse)
    assert_refused(lambda: calibrated(file), "a.jsonl: cannot be read (Permission denied)")


@pytest.mark.parametrize("name", ["no.json", "no.ndjson", "NO.JSONL", "no.jsonl.gz", "no.parquet"])
def test_a_file_that_is_not_there_is_no_data_set(name):
    assert_refused(lambda: calibrated(name), name, "no such file or folder; check the path")


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    file = stored(tmp_path, "a.parquet", ROWS)
    result = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda _: None))
    monkeypatch.setattr(rows, "importlib", result)
    for read in readers(file):
        assert_refused(read, "a.parquet", "pip install pyarrow", code=5)


# Byte-order marks


def test_a_byte_order_mark_is_no_token_for_any_reader(tmp_path):
    text = "\n\n\n".join(row["text"] for row in ROWS).encode()
    asked = json_lines([{"prompt": "w1"}])
    for name, content, read in (
        ("a.txt", text, calibrated),
        ("a.txt", text, scored),
        ("a.txt.gz", gzip.compress(text, mtime=0), scored),
        ("a.jsonl", json_lines(ROWS), calibrated),
        ("a.jsonl", json_lines(ROWS), scored),
        ("a.jsonl", asked, prompted),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        plain = read(file)
        if name.endswith(".gz"):
            file.write_bytes(gzip.compress(BYTE_ORDER_MARK + text, mtime=0))
        else:
            file.write_bytes(BYTE_ORDER_MARK + content)
        assert read(file) == plain
    rows_with_mark = [{"text": "\ufeff" + row["text"]} for row in ROWS]
    marked, plain = tmp_path / "marked.jsonl", tmp_path / "a.jsonl"
    marked.write_bytes(json_lines(rows_with_mark))
    plain.write_bytes(json_lines(ROWS))
    assert (calibrated(marked), scored(marked)) == (calibrated(plain), scored(plain))
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(BYTE_ORDER_MARK + b'model = "demo"')
    assert read_toml(recipe) == {"model": "demo"}
    # The negative control: it is a token to the tokenizer, and within a text stays one.
    within = tmp_path / "within.txt"
    within.write_bytes(text[:2] + BYTE_ORDER_MARK + text[2:])
    (tmp_path / "a.txt").write_bytes(text)
    assert scored(within) != scored(tmp_path / "a.txt")


# Conversations


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'nobody' %}"
    "{{ raise_exception('nobody may speak') }}{% endif %}"
    " {{ message.role }} : {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %} assistant : {% endif %}"
)


def chat_tokenizer(template=TEMPLATE, *, adds_bos=True):
    tokenizer = word_tokenizer(adds_bos=adds_bos)
    tokenizer.chat_template = template
    return tokenizer


def talk(n):
    return [
        {"role": "user", "content": words(*[n] * 6)},
        {"role": "assistant", "content": words(*[n + 1] * 6)},
    ]


TALKS = [talk(n) for n in range(0, 200, 2)]
SHAREGPT = {"user": "human", "assistant": "gpt"}
FORMS = {
    "messages": lambda turns: {"messages": turns},
    "null": lambda turns: {"text": None, "messages": turns, "conversations": None},
    "conversations": lambda turns: {"conversations": turns},
    "sharegpt": lambda turns: {
        "conversations": [
            {"from": SHAREGPT.get(t["role"], t["role"]), "value": t["content"]} for t in turns
        ]
    },
    "parts": lambda turns: {
        "messages": [
            {
                "role": t["role"],
                "content": [
                    {"type": "text", "text": t["content"][:3]},
                    {"type": "text", "text": t["content"][3:]},
                ],
            }
            for t in turns
        ]
    },
}
forms = pytest.mark.parametrize("form", FORMS)


def expected_text(turns):
    """What the template stands for, by hand, without the tokens that stand between documents."""
    return "<eos>\n".join(f" {t['role']} : {t['content']}" for t in turns)


@forms
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.jsonl.gz", "a.parquet"])
def test_conversations_are_written_by_the_chat_template(tmp_path, form, name):
    held = [FORMS[form](turns) for turns in TALKS]
    file, tokenizer = stored(tmp_path, name, held), chat_tokenizer()
    result = list(documents.documents(str(file), tokenizer=tokenizer))
    assert result == [expected_text(turns) for turns in TALKS]
    plain = stored(tmp_path, "a.ndjson", [{"text": text} for text in result])
    assert calibrated(file, tokenizer) == calibrated(plain, tokenizer)
    assert scored(file, tokenizer) == scored(plain, tokenizer)
    field = next(key for key, value in held[0].items() if value)
    assert calibrated(file, tokenizer, text_field=field) == calibrated(file, tokenizer)
    # The negative control: what is said, by someone else.
    others = [FORMS[form]([{**t, "role": "tool"} for t in turns]) for turns in TALKS]
    changed = stored(tmp_path, name, others)
    assert list(documents.documents(str(changed), tokenizer=tokenizer)) != result


def test_streamed_conversations_are_written_too(monkeypatch):
    datasets = pytest.importorskip("datasets")
    held = [FORMS["sharegpt"](turns) for turns in TALKS]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(held))
    result = list(documents.documents("owner/name", tokenizer=chat_tokenizer()))
    assert result == [expected_text(turns) for turns in TALKS]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_special_tokens_stand_once(tmp_path, adds_bos):
    """Ids as the template's own text gives them, document by document."""
    file = stored(tmp_path, "a.jsonl", [FORMS["messages"](turns) for turns in TALKS])
    tokenizer = chat_tokenizer(adds_bos=adds_bos)
    for ids in (*calibrated(file, tokenizer), *scored(file, tokenizer)):
        assert not any(a == b and a in (BOS, EOS) for a, b in zip(ids, ids[1:], strict=False))
        # One before every window, or else one before every text, as the template has it.
        num_texts = sum(b == EOS and a == 0 for a, b in zip(ids, ids[1:], strict=False))
        assert ids.count(BOS) == 1 if adds_bos else ids.count(BOS) >= num_texts // 2 - 1
    whole = tokenizer.apply_chat_template(TALKS[0], return_dict=False)
    assert scored(file, tokenizer)[0][: len(whole)] == whole and len(whole) == 19


def test_a_report_of_a_recipe_may_name_the_field():
    assert report.build({"text": "a.json", "text_field": "body"}).text_field == "body"
    assert report.build({}).text_field == documents.TEXT
    with pytest.raises(MoefyError, match="--text-field is 3; expected str"):
        report.build({"text_field": 3})


def test_a_text_field_comes_before_a_conversation(tmp_path):
    held = [{"text": "w1", **FORMS["messages"](talk(2))}]
    file = str(stored(tmp_path, "a.jsonl", held))
    assert list(documents.documents(file, tokenizer=chat_tokenizer())) == ["w1"]
    result = documents.documents(file, text_field="messages", tokenizer=chat_tokenizer())
    assert list(result) == [expected_text(talk(2))]
    assert_refused(lambda: list(documents.documents(file, text_field="body")), "no field 'body'")


def test_a_template_that_asks_for_the_day_gives_the_same_text_on_any(tmp_path):
    file = stored(tmp_path, "a.jsonl", [FORMS["messages"](talk(1))])
    code = "{% if strftime_now is defined %}\n{{ strftime_now('%A, %-d %b %Y') }}{% endif %}"
    tokenizer = chat_tokenizer(f"  {code} {{{{ messages[0].content }}}}")
    (text,) = documents.documents(str(file), tokenizer=tokenizer)
    assert text == tokenizer.apply_chat_template(talk(1), tokenize=False).replace(
        f"{datetime.now():%A, %-d %b %Y}", "Wednesday, 01 Jan 2025"
    )
    assert "Wednesday, 01 Jan 2025 w1" in text


def refused_turns(tmp_path, turns, *says, tokenizer=None):
    file = stored(tmp_path, "a.jsonl", [*map(FORMS["messages"], TALKS[:2]), {"messages": turns}])
    for read in (calibrated, scored, prompted):
        where = () if "chat template" in says[0] else ("line 3",)
        assert_refused(lambda read=read: read(file, tokenizer or chat_tokenizer()), *where, *says)


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path):
    refused_turns(
        tmp_path, talk(1), "no chat template", "chat_template.jinja", tokenizer=word_tokenizer()
    )


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ("hello", ["turn 1: a turn is str"]),
        ({"content": "w1"}, ["turn 1: the fields are content", "'role'"]),
        ({"from": "prompter", "value": "w1"}, ["from 'prompter'", "human"]),
        ({"role": "user", "content": 3}, ["turn 1: content is int"]),
        ({"role": "user", "content": [{"type": "image_url"}]}, ["type 'image_url'", "text alone"]),
        ({"role": "user", "content": [3]}, ["type 'int'"]),
        ({"role": "nobody", "content": "w1"}, ["refuses the conversation (nobody may speak)"]),
    ],
)
def test_turns_that_are_none_are_refused(tmp_path, turn, says):
    if isinstance(turn, str):
        file = stored(tmp_path, "a.jsonl", [{"messages": [turn]}])
        tokenizer = chat_tokenizer()
        assert_refused(lambda: calibrated(file, tokenizer), "list", "turns of a conversation")
        assert_refused(lambda: prompted(file, tokenizer), *says)
        return
    refused_turns(tmp_path, [turn], *says)


def test_a_template_that_fails_in_any_way_is_one_line(tmp_path):
    for template in ("{{ messages[0]['content'] + 1 }}", "{{ none.x.y }}", "{% broken"):
        refused_turns(
            tmp_path, talk(1), "chat template refuses", tokenizer=chat_tokenizer(template)
        )


def test_what_speakers_and_turns_become():
    turns = [
        {"from": "system", "value": "a"},
        {"from": "Human", "value": "b", "weight": 0},
        {"from": "function_call", "value": "c"},
        {"role": "gpt", "content": "c"},
        {"role": "ipython", "content": "c"},
        {"from": "observation", "value": "d"},
        {"role": "assistant", "content": None, "tool_calls": [{"x": 1}], "name": None},
        {"role": "tool", "content": ["e", {"type": "output_text", "text": "f"}, {"text": "g"}]},
    ]
    assert chat.turns(turns, "") == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "c"},
        {"role": "ipython", "content": "c"},
        {"role": "tool", "content": "d"},
        {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]},
        {"role": "tool", "content": "efg"},
    ]


@forms
def test_prompts_of_conversations(tmp_path, form):
    tokenizer = chat_tokenizer()
    file = stored(tmp_path, "array.json", [FORMS[form](talk(1)), FORMS[form](talk(3)[:1])])
    asked = [" user : " + words(*[n] * 6) + "<eos>\n assistant : " for n in (1, 3)]
    turns = [[{"role": "user", "content": words(*[n] * 6)}] for n in (1, 3)]
    more = {"chat": True, "json": False}
    assert prompted(file, tokenizer) == [
        {"prompt": asked[0], "answer": words(*[2] * 6), "turns": turns[0], **more},
        {"prompt": asked[1], "answer": None, "turns": turns[1], **more},
    ]
    assert tokenizer(asked[0])["input_ids"][:2].count(BOS) == 1


def test_answers_in_a_chat_follow_without_a_space(pico):
    """Likelihoods of a template's own text, whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pico("llama")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, answer = "ask: what? [answer]", "that"
    for is_chat, glue in ((True, ""), (False, " ")):
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(glue + answer)["input_ids"]
        ids = packing.torch.tensor([head + tail])
        log_p = model(ids).logits[0].log_softmax(-1)
        true = [log_p[len(head) + n - 1, token].item() for n, token in enumerate(tail)]
        result = likelihood(model, tokenizer, prompt, answer, chat=is_chat)
        assert result == pytest.approx(sum(true) / len(true), abs=1e-5)


# Commands


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STONES = [
    [
        {"role": "user", "content": f"What of the {n} stones?"},
        {"role": "assistant", "content": f"The {n} old stones near the river are quiet today."},
    ]
    for n in range(40)
]
CHATML_TEXTS = [
    "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    for turns in STONES
]


@pytest.fixture
def chat_model(own_pico):
    """A tiny model whose tokenizer has a chat template."""
    folder = own_pico("llama")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def written_files(tmp_path):
    """The same conversations as text, in rows and in two containers, one with a BOM."""
    texts = [{"text": text} for text in CHATML_TEXTS]
    folders = [tmp_path / name for name in ("texts", "chats", "sharegpt")]
    for folder in folders:
        folder.mkdir()
    return (
        stored(folders[0], "a.jsonl", texts),
        stored(folders[1], "mark.json", [FORMS["messages"](turns) for turns in STONES]),
        stored(folders[2], "a.jsonl.gz", [FORMS["sharegpt"](turns) for turns in STONES]),
    )


def test_every_command_reads_conversations_alike(chat_model, converted, tmp_path):
    from moefy.config.finetune import Settings
    from moefy.config.recipe import build
    from moefy.config.report import Settings as ReportSettings
    from moefy.convert.calibration import calibration_tokens
    from moefy.convert.prepare import prepare
    from moefy.evaluate.prepare import prepare as prepare_report
    from moefy.finetune import inputs
    from moefy.finetune.text import read_text
    from moefy.runs import folder as runs

    files = written_files(tmp_path)
    shape = {"tokens": 512, "sequence_length": 64}
    recipes = [{"model": str(chat_model), "calibration": str(file), **shape} for file in files]
    jobs = [prepare(build(None, recipe, [])) for recipe in recipes]
    read = [calibration_tokens(job, lambda *_: None).ids_BT.tolist() for job in jobs]
    assert read[0] == read[1] == read[2]
    run = converted(chat_model)

    shape = {"sequence_length": 32, "batch_size": 1, "tokens": 640, "validation_tokens": 64}
    read = [
        read_text(
            inputs.open_run(run), Settings(data=(str(file),), **shape), 1, None, lambda *_: None
        ).ids_BT.tolist()
        for file in files
    ]
    assert read[0] == read[1] == read[2]

    def windows(file, **more):
        """What a report scores, and what it asks."""
        asked = ReportSettings(text=(file,), sequence_length=64, tokens=256, controls=False, **more)
        prepared = prepare_report(run, runs.open_run(run), asked, tmp_path, lambda *_: None)
        return [ids_T.tolist() for ids_T in prepared.windows[file.stem]], prepared.prompts

    scores = [windows(file)[0] for file in files]
    assert scores[0] == scores[1] == scores[2]
    _, asked = windows(files[0], prompts=files[1])
    assert asked == windows(files[0], prompts=files[2])[1]
    assert asked[3]["prompt"] == (
        "<|im_start|>user\nWhat of the 3 stones?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked[3]["answer"] == STONES[3][1]["content"]


def test_every_command_names_the_field_of_rows(
    chat_model, converted, tmp_path, monkeypatch, capsys
):
    run = converted(chat_model)
    file = stored(tmp_path, "array.json", [{"body": text} for text in CHATML_TEXTS])
    few = ["--tokens", "512", "--sequence-length", "64", "--quiet"]

    def refusal(*command):
        monkeypatch.setattr(sys, "argv", ["moefy", *map(str, command), *few])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 3
        return line

    for command in (
        ["convert", chat_model, tmp_path / "out", "--calibration", file],
        ["finetune", run, "--out", tmp_path / "out", "--data", file],
        ["report", run, "--text", file],
    ):
        assert "array.json, row 1: no field 'text'; the fields are 'body'" in refusal(*command)
        assert "row 1: no field 'none'" in refusal(*command, "--text-field", "none")
    assert "row 1: no prompt" in refusal("report", run, "--prompts", file)
    assert not (tmp_path / "out").exists()


def test_finetune_takes_rows_of_ids(converted, pico, tmp_path):
    from moefy.config.finetune import Settings
    from moefy.finetune import inputs
    from moefy.finetune.text import read_text

    run = converted(pico("llama"))
    held = [{"input_ids": [(7 * row + 3 * n) % 128 for n in range(80)]} for row in range(20)]
    file = str(stored(tmp_path, "array.json", held))
    shape = {"sequence_length": 32, "batch_size": 1, "tokens": 640, "validation_tokens": 64}
    asked = Settings(data=(str(file),), text_field="input_ids", **shape)
    tokens = read_text(inputs.open_run(run), asked, 1, None, lambda *_: None)
    expected = packing.load_ids(file, packing.Amount(704, 32, heldout=64 / 704))
    assert tokens.ids_BT.tolist() == expected.ids_BT.tolist()
