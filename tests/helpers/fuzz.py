"""Fuzz what is read of a checkpoint, guided by coverage.

    python tests/helpers/fuzz.py header -runs=10000

The first argument says what is fuzzed: header, index or config; all others are libFuzzer's, such as
-max_total_time=200. Needs `pip install atheris`. What must hold is said in `test_fuzz`.
"""

import importlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["moefy.files.safetensors_header", "moefy.checkpoint.validate", "moefy.convert.prepare"]
):
    for name in (
        "moefy.files.safetensors_header",
        "moefy.checkpoint.validate",
        "moefy.convert.prepare",
    ):
        importlib.import_module(name)

import damage
import pico
from damage import CONFIG, INDEX, SINGLE
from reading import assert_read_as_by_the_library, header_of, prepared, with_header

SEEN: Counter[str] = Counter()


def main() -> None:
    kind, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = Path(place) / "model", Path(place) / "corpus"
        corpus.mkdir()
        pico.build_model(folder, "llama", {})
        pico.build_tokenizer(folder)
        whole = (folder / SINGLE).read_bytes()
        if kind == "index":
            damage.split(folder)
        file = folder / {"header": SINGLE, "index": INDEX, "config": CONFIG}[kind]
        first = json.dumps(header_of(whole)).encode() if kind == "header" else file.read_bytes()
        shutil.copy(folder / CONFIG, corpus / "config") if kind == "config" else None
        (corpus / "first").write_bytes(first)

        def once(data: bytes) -> None:
            SEEN["examples"] += 1
            file.write_bytes(with_header(whole, data) if kind == "header" else data)
            if job := prepared(folder):
                SEEN["accepted"] += 1
                assert_read_as_by_the_library(job)
            if SEEN["examples"] % 1000 == 0:
                print(dict(SEEN), flush=True)

        words = Path(place) / "words"
        words.write_text("\n".join(f'"{word}"' for word in WORDS))
        given = [
            f"-dict={words}",
            f"-max_len={2 * len(first)}",
            f"-artifact_prefix={place}/",
            *options,
            str(corpus),
        ]
        atheris.Setup([sys.argv[0], *given], once)
        atheris.Fuzz()


WORDS = [
    *("F32", "BF16", "F8_E4M3", "I8", "data_offsets", "shape", "dtype", "__metadata__"),
    *("weight_map", "metadata", "total_size", ".safetensors", "../", "null", "true", "NaN"),
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("rope_parameters", "layer_types", "quantization_config", "auto_map", "1e999", "-1", "[]"),
]


if __name__ == "__main__":
    main()
