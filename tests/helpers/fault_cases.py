"""The fault matrix as data: what is broken, and what the command line must then say.

A case belongs to a row of the matrix, by the number in front of its name.
`tests/checkpoint/test_refused_models.py` runs every case in one process,
`tests/helpers/faults_table.py` each in a process of its own and prints what happened. A case is
arranged, then acted; what lies in its place in between must lie there unchanged afterwards, and
nothing beside but what it `leaves`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import damage as d
import torch
from damage import (
    CONFIG,
    DOWN,
    EMBEDDING,
    GATE,
    HEAD,
    INDEX,
    KEY,
    QUERY,
    SHARDS,
    SINGLE,
    UP,
    Damage,
)

FEW = ("--tokens", "512", "--sequence-length", "64")


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    """A folder with a whole model and a text in it, and a way to run the command line."""

    root: Path
    run: Callable[..., Done]

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def convert(self, *more: object) -> Done:
        """Convert on few tokens of the text; what is given later counts."""
        text = () if "--calibration" in more else ("--calibration", self.text)
        few = () if "--tokens" in more else FEW
        return self.run("convert", self.model, self.out, *few, *text, *more, "--quiet")


@dataclass(frozen=True)
class Case:
    """One line of the matrix."""

    name: str
    words: str
    """How it was made."""
    says: tuple[str, ...]
    code: int
    arrange: Callable[[Place], object]
    act: Callable[[Place], Done]
    early: bool = False
    """Whether configuration and headers alone refuse it, before torch is imported."""
    leaves: tuple[str, ...] = ()
    """What may lie in the place afterwards that did not before."""
    elsewhere: str = ""
    """The test that has it already, where it takes long; then only the table runs it here."""

    @property
    def row(self) -> int:
        return int(self.name.split()[0])


def model(
    name: str,
    damage: Damage,
    says: tuple[str, ...] | list[str],
    code: int = 3,
    *flags: str,
    early: bool = True,
) -> Case:
    """A damaged model; with code 0 it is converted all the same, and `says` is noted."""
    return Case(
        name,
        damage.words + (f"; {' '.join(flags)}" if flags else ""),
        tuple(says),
        code,
        lambda place: damage(place.model),
        lambda place: noted(place, *flags) if code == 0 else place.convert(*flags),
        early=early and code != 0,
        leaves=() if code else ("out",),
    )


def late(name: str, damage: Damage, says: tuple[str, ...], code: int = 3, *flags: str) -> Case:
    """A model that only the class or the values show to be damaged."""
    return model(name, damage, says, code, *flags, early=False)


def usage(name: str, flags: list[str], says: tuple[str, ...], code: int = 2) -> Case:
    """A whole model and flags that cannot be, or with code 0 that are noted."""
    return Case(
        name,
        " ".join(flags),
        says,
        code,
        lambda place: None,
        lambda place: noted(place, *flags) if code == 0 else place.convert(*flags),
        leaves=() if code else ("out",),
    )


def calibration(
    name: str,
    words: str,
    file: str,
    content: bytes | None,
    says: tuple[str, ...],
    code: int = 3,
    *flags: str,
) -> Case:
    """A whole model and a calibration text `file`."""

    def arrange(place: Place) -> None:
        if content is not None:
            (place.root / file).write_bytes(content)

    def act(place: Place) -> Done:
        given = ("--calibration", place.root / file, *flags)
        return noted(place, *given) if code == 0 else place.convert(*given)

    return Case(name, words, says, code, arrange, act, leaves=() if code else ("out",))


def noted(place: Place, *flags: object) -> Done:
    """Convert, and give the notes of the run's own report as what was said."""
    done = place.convert(*flags)
    if done.code:
        return done
    found = json.loads((place.out / "moefy" / "conversion.json").read_text())
    return Done(0, "", "\n".join([*found["notes"], *found["calibration"]["notes"]]))


# --- checkpoints ---------------------------------------------------------------------------------

CASES = [
    model("1 truncated", d.cut(SINGLE, 90_000), (SINGLE, "90000")),
    model("1 truncated shard", d.sharded(d.cut(SHARDS[1], 9_000)), (SHARDS[1], "9000")),
    model(
        "2 pointer of Git LFS",
        d.write(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        (SINGLE, "git lfs pull"),
    ),
    model("2 empty", d.write(SINGLE, b""), (SINGLE, "0 bytes")),
    model("2 random bytes", d.random_bytes, (SINGLE,)),
    model("3 trailing bytes", d.append(SINGLE, b"PK\x03\x04"), (SINGLE, "end")),
    model("3 header of 2^62 bytes", d.write(SINGLE, (2**62).to_bytes(8, "little")), (SINGLE,)),
    model("3 header over 100 MB", d.huge_header, (SINGLE, "100000001")),
    model(
        "3 overlapping",
        d.header(
            "two tensors at the same bytes",
            lambda value: value[UP].update(data_offsets=value[GATE]["data_offsets"]),
        ),
        (SINGLE, "starts at byte"),
    ),
    model(
        "3 unknown dtype",
        d.header("dtype F3", lambda value: value[UP].update(dtype="F3")),
        (SINGLE, "F3"),
    ),
    model(
        "3 shape",
        d.header("a shape of [-96, -32]", lambda value: value[UP].update(shape=[-96, -32])),
        (SINGLE, UP),
    ),
    model("4 one shard", d.sharded(d.remove(SHARDS[1])), (SHARDS[1], "hf download")),
    model("4 all shards", d.sharded(d.remove(*SHARDS)), (*SHARDS, "hf download")),
    model("5 cut index", d.sharded(d.cut(INDEX, 200)), (INDEX,)),
    model("5 list", d.sharded(d.write(INDEX, "[]")), (INDEX, "object")),
    model("5 no map", d.sharded(d.write(INDEX, '{"metadata": {}}')), (INDEX, "weight_map")),
    model("5 empty map", d.sharded(d.write(INDEX, '{"weight_map": {}}')), (INDEX, "weight_map")),
    model("5 list map", d.sharded(d.write(INDEX, '{"weight_map": ["a"]}')), (INDEX, "weight_map")),
    model("5 number", d.index("a file 7", lambda names: names.update({UP: 7})), (INDEX, "7")),
    model(
        "5 null", d.index("a file null", lambda names: names.update({UP: None})), (INDEX, "None")
    ),
    model(
        "5 repeated key", d.sharded(d.write(INDEX, '{"a": 1, "a": 2}')), (INDEX, "duplicate key")
    ),
    model(
        "6 index lacks",
        d.index(f"without {UP}", lambda names: names.pop(UP)),
        (INDEX, UP, "not listed", "ignore_index"),
    ),
    model(
        "6 index has more",
        d.index("a tensor x that no shard has", lambda names: names.update(x=SHARDS[0])),
        (INDEX, "'x'", "no shard"),
    ),
    model(
        "6 in two shards",
        d.sharded(Damage("the second a copy of the first", lambda f: _copy(f, *SHARDS))),
        SHARDS[1:],
    ),
    model(
        "6 index lacks, accepted",
        d.index(f"without {UP}", lambda names: names.pop(UP)),
        (),
        0,
        *("--set", "ignore_index=true"),
    ),
    model(
        "6 wrong shards",
        d.index(
            "every tensor in the other shard",
            lambda names: names.update(
                {name: SHARDS[1 - SHARDS.index(file)] for name, file in names.items()}
            ),
        ),
        (),
        0,
    ),
    model("7 no FFN", d.tensor(UP), (UP,)),
    model("7 no embedding", d.tensor(EMBEDDING), (EMBEDDING,)),
    late("7 no attention", d.tensor(QUERY), (QUERY,)),
    late("7 no norm", d.tensor("model.norm.weight"), ("model.norm.weight",)),
    late("7 no head", d.tensor(HEAD), (HEAD,)),
    late("8 extra", d.tensor("lora_A.weight", torch.ones(2)), ("lora_A.weight", "llama")),
    model(
        "8 adapter",
        d.write("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "x/y"}'),
        ("adapter_config.json", "merge_and_unload"),
        4,
    ),
    *[
        model(f"8 {prefix}", d.before(prefix), (prefix.split(".")[0], whose, "save_pretrained"))
        for prefix, whose in {
            "_orig_mod.": "torch.compile",
            "module.": "DataParallel",
            "module._orig_mod.": "DataParallel",
            "base_model.model.": "PEFT",
            "language_model.": "pictures or sound",
            "student.": "'student.model.layers.'",
        }.items()
    ],
    *[
        model(f"8 {part} within", d.renamed(f"{part} within names", change), (part, whose, advice))
        for part, whose, advice, change in (
            (
                "base_layer",
                "PEFT",
                "merge_and_unload",
                lambda n: n.replace("proj.", "proj.base_layer."),
            ),
            ("_orig_mod", "torch.compile", "inside", lambda n: n.replace("mlp.", "_orig_mod.mlp.")),
        )
    ],
    model(
        "8 base class without a head",
        d.then(d.tensor(HEAD), d.bare, d.config(architectures=["LlamaModel"])),
        (HEAD, "LlamaModel", "predicts no next token"),
        4,
    ),
    model(
        "8 names of the base class and a head",
        d.bare,
        (),
        0,
    ),
    model(
        "8 names of the base class without a head",
        d.then(d.tensor(HEAD), d.bare),
        (HEAD, "tie_word_embeddings", "predicts no next token"),
    ),
    *[
        model(
            f"20 {name}",
            d.then(
                d.config(architectures=[name]),
                d.renamed("another head", lambda n: n.replace("lm_head", "score")),
            ),
            (name, "predicts no next token", "AutoModelForCausalLM"),
            4,
        )
        for name in (
            "LlamaForSequenceClassification",
            "LlamaForTokenClassification",
            "LlamaForQuestionAnswering",
            "LlamaForRewardModel",
            "LlamaRewardModel",
        )
    ],
    model(
        "8 buffers of old versions",
        d.tensor("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("layers.0.self_attn.rotary_emb.inv_freq", "not written"),
        0,
    ),
    model(
        "9 FFN",
        d.tensor(UP, lambda w: w[:95], "one row less"),
        (UP, "[95, 32]", "[96, 32]"),
    ),
    model(
        "9 embedding",
        d.tensor(EMBEDDING, lambda w: w[:127], "one row less"),
        ("[127, 32]", "[128, 32]"),
    ),
    model(
        "9 query",
        d.tensor(QUERY, lambda w: w[:31], "one row less"),
        (QUERY, "[31, 32]", "[32, 32]"),
    ),
    model(
        "9 key",
        d.tensor(KEY, lambda w: w[:, :31], "one column less"),
        (KEY, "[16, 31]", "[16, 32]"),
    ),
    model("9 head_dim", d.config(head_dim=16), (QUERY, "[32, 32]", "[64, 32]")),
    late(
        "10 NaN",
        d.tensor(UP, d.first_value(float("nan")), "three values NaN"),
        (UP, "3 of 3072"),
    ),
    late(
        "10 infinity",
        d.tensor(QUERY, d.first_value(float("-inf")), "three values infinite"),
        (QUERY, "3 of 1024"),
    ),
    late("11 FFN of zeros", d.tensor(UP, torch.zeros_like, "all zeros"), (UP, "zeros", "--layers")),
    late("11 constant FFN", d.tensor(DOWN, torch.ones_like, "all ones"), (DOWN, "all 1")),
    late(
        "11 FFN of zeros, left dense",
        d.tensor(UP, torch.zeros_like, "all zeros"),
        (UP, "all zeros", "never trained"),
        0,
        *("--layers", "0"),
    ),
    late(
        "11 attention of zeros",
        d.tensor(QUERY, torch.zeros_like, "all zeros"),
        (QUERY, "all zeros", "never trained"),
        0,
    ),
    late("11 flipped bit", d.flip_bit(HEAD, 77, 30), (HEAD, "flipped bit", "SHA-256"), 0),
    model(
        "12 two of them",
        Damage("a single file and an index with its shards", lambda f: _both(f)),
        (SINGLE, INDEX, "ambiguous"),
    ),
    *[
        model(f"13 {name}", d.elsewhere(target), (INDEX, "security"))
        for name, target in {
            "parent": "../outside.safetensors",
            "absolute": "ABSOLUTE",
            "sub-folder": "sub/../../outside.safetensors",
            "backslash": r"..\\outside.safetensors",
            "drive": "C:outside.safetensors",
            "NUL": r"a\u0000.safetensors",
            "line break": r"a\n.safetensors",
            "dots": "..",
            "nothing": "",
            "pickle": "pytorch_model.bin",
        }.items()
    ],
    model("14 hub cache", d.hub_cache, (), 0),
    model("14 hub cache of shards", d.sharded(d.hub_cache), (), 0),
    model("14 link within", d.link(SINGLE, "weights/model.safetensors", move=True), (), 0),
    model("15 link out", d.link(SINGLE, "../outside.safetensors", move=True), (SINGLE, "outside")),
    model("15 shard out", d.sharded(d.link(SHARDS[0], "../a", move=True)), (SHARDS[0], "outside")),
    model("15 config out", d.link(CONFIG, "../config.json", move=True), (CONFIG, "outside")),
    model("15 blobs of no cache", d.link(SINGLE, "../blobs/x", move=True), (SINGLE, "outside")),
    model("15 device", d.link(SINGLE, "/dev/zero"), (SINGLE, "regular")),
    model("15 broken link", d.link(SINGLE, "gone"), (SINGLE, "hf download")),
    model("15 loop", d.link(SINGLE, SINGLE), (SINGLE, "hf download")),
    model("15 pipe", d.pipe(SINGLE), (SINGLE, "regular")),
    model("15 pipe as shard", d.sharded(d.pipe(SHARDS[1])), (SHARDS[1], "regular")),
    model("15 pipe as index", d.sharded(d.pipe(INDEX)), (INDEX, "regular")),
    model("15 pipe as config", d.pipe(CONFIG), (CONFIG, "regular")),
    late("15 pipe as tokenizer", d.pipe("tokenizer.json"), ("tokenizer.json", "regular")),
    late("15 tokenizer out", d.link("tokenizer.json", "../t", move=True), ("outside",)),
    model("15 folder", d.special(SINGLE, "a folder", os.mkdir), (SINGLE, "regular")),
    model("15 socket", d.special(SINGLE, "a socket", d.unix_socket), (SINGLE, "regular")),
    model(
        "16 pickle only", d.moved(SINGLE, "pytorch_model.bin"), ("pytorch_model.bin", "save_pre")
    ),
    model("16 no weights", d.remove(SINGLE), (SINGLE, INDEX)),
    model(
        "16 hostile pickle beside",
        d.write("pytorch_model.bin", b"cos\nsystem\n(S'touch it-ran'\ntR."),
        (),
        0,
    ),
    *[
        model(f"16 {name} only", d.moved(SINGLE, name), (INDEX, name, "transformers' own format"))
        for name in ("consolidated.safetensors", "model.fp16.safetensors", SHARDS[0])
    ],
    model(
        "16 adapter only",
        d.then(
            d.remove(CONFIG),
            d.moved(SINGLE, "adapter_model.safetensors"),
            d.write("adapter_config.json", '{"peft_type": "LORA"}'),
        ),
        ("adapter", "no model by itself", "merge_and_unload"),
    ),
    model(
        "16 GGUF only",
        d.then(d.remove(CONFIG), d.moved(SINGLE, "model.gguf")),
        ("model.gguf", "made from"),
    ),
    model(
        "16 other files beside the shards",
        d.sharded(
            *(d.write(name, "no model's") for name in ("consolidated.safetensors", "lora.bin")),
            *(d.write(name, "{}") for name in ("model.safetensors.index.fp16.json", "params.json")),
            d.write("model.fp16-00001-of-00002.safetensors", "not ours to read"),
            d.write("adapter_model.safetensors", "not ours to read"),
        ),
        (),
        0,
    ),
    model("17 no config", d.remove(CONFIG), (CONFIG, "fetch it again")),
    model("17 empty", d.write(CONFIG, ""), (CONFIG,)),
    model("17 cut", d.cut(CONFIG, 100), (CONFIG,)),
    model("17 list", d.write(CONFIG, '[{"model_type": "llama"}]'), (CONFIG, "object")),
    model("17 nested", d.config(note=json.loads("[" * 60 + "]" * 60)), (CONFIG, "50 deep")),
    model("17 deep", d.write(CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000), (CONFIG,)),
    model(
        "17 repeated key",
        d.write(CONFIG, '{"model_type": "bert", "model_type": "llama"}'),
        ("duplicate key",),
    ),
    model("17 over 1 MB", d.config(note="x" * 1_000_000), (CONFIG, "1000000")),
    model("17 not UTF-8", d.write(CONFIG, b'{"model_type": "\xff"}'), (CONFIG,)),
    model("17 long number", d.write(CONFIG, '{"a": ' + "9" * 5_000 + "}"), (CONFIG,)),
    model("17 no model_type", d.config(model_type=...), (CONFIG, "model_type", "moefy families")),
    model(
        "17 odd model_type",
        d.config(model_type=["llama"]),
        (CONFIG, "model_type", "moefy families"),
    ),
    late("17 cut generation defaults", d.cut("generation_config.json", 9), ("generation_config",)),
    model("18 FFN of 10^12", d.config(intermediate_size=10**12), ("mlp.gate_proj", str(10**12))),
    model("18 10^12 wide", d.config(hidden_size=10**12), (EMBEDDING, str(10**12))),
    model("18 10^12 tokens", d.config(vocab_size=10**12), (EMBEDDING, str(10**12))),
    model("18 10^12 heads", d.config(num_attention_heads=10**12), ("num_attention", str(10**12))),
    model("18 10^6 layers", d.config(num_hidden_layers=10**6), ("num_hidden_layers", "2 layers")),
    model("18 fewer layers", d.config(num_hidden_layers=1), ("num_hidden_layers", "2 layers")),
    model("18 head groups", d.config(num_key_value_heads=3), ("num_key_value_heads", "3")),
    model("18 no head groups", d.config(num_key_value_heads=0), ("num_key_value_heads", "0")),
    model("18 10^9 labels", d.config(num_labels=10**9), ("num_labels", str(10**9))),
    late("18 epsilon", d.config(rms_norm_eps="small"), (CONFIG, "rms_norm_eps")),
    late("18 padding", d.config(pad_token_id=10**9), (CONFIG,)),
    late("18 rope", d.config(rope_parameters={"rope_type": "spiral"}), (CONFIG, "spiral")),
    *[
        model(f"18 {key} {value!r}", d.config(**{key: value}), (CONFIG, key))
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        for value in (-64, 0, True, "64", 64.0, float("nan"), None, [64], ...)
    ],
    model("19 code", d.code_of_its_own, (CONFIG, "auto_map"), 4),
    late(
        "19 code of the tokenizer",
        d.config("tokenizer_config.json", auto_map={"AutoTokenizer": ["model.Model", None]}),
        ("tokenizer_config.json", "auto_map"),
        4,
    ),
    model(
        "19 attention that is not installed",
        d.config(
            attn_implementation="flash_attention_2",
            _attn_implementation="flash_attention_2",
            experts_implementation="none",
            output_attentions=True,
            return_dict=False,
        ),
        (),
        0,
        *("--layers", "1:", "--calibration", "self"),
    ),
    model("19 kernel", d.config(attn_implementation="evil/kernel"), (CONFIG, "kernel"), 4),
    model(
        "19 kernel by its inner name",
        d.config(_attn_implementation_internal="evil/kernel"),
        (CONFIG, "kernel"),
        4,
    ),
    model(
        "19 weights of its own",
        d.config(transformers_weights="other.safetensors"),
        (CONFIG, "transformers_weights"),
        4,
    ),
    *[
        model(f"20 {name}", d.other_config(**value), says, 4)
        for name, says, value in (
            ("encoder", ("'electra'", "encoder"), {"model_type": "electra", "type_vocab_size": 2}),
            ("masked", ("encoder",), {"model_type": "x", "architectures": ["XForMaskedLM"]}),
            ("two halves", ("encoder",), {"model_type": "bart", "is_encoder_decoder": True}),
            ("SSM", ("state-space", "moefy families"), {"model_type": "mamba", "state_size": 16}),
            ("recurrent", ("'rwkv'", "recurrent"), {"model_type": "rwkv"}),
            ("MoE", ("Mixture",), {"model_type": "mixtral", "num_local_experts": 8}),
            ("MoE again", ("Mixture",), {"model_type": "qwen3_moe", "num_experts": 8}),
            ("deepseek", ("Mixture",), {"model_type": "deepseek_v3", "n_routed_experts": 8}),
            ("picture", ("several",), {"model_type": "llava", "vision_config": {"a": 1}}),
            ("no class", ("'bloom'", "unknown"), {"model_type": "bloom", "n_embed": 32}),
        )
    ],
    model("20 typo", d.config(model_type="lama"), ("'lama'", "unknown", "nearest is llama"), 4),
    model("20 path", d.config(model_type="../llama"), ("unknown", "moefy families"), 4),
    model("20 no module", d.config(model_type="family"), ("unknown",), 4),
    model("21 biases", d.config(mlp_bias=True), (CONFIG, "mlp_bias"), 4),
    late(
        "21 biases that are not there",
        d.config(attention_bias=True),
        (CONFIG, "self_attn.q_proj.bias"),
    ),
    model("21 activation", d.config(hidden_act="snake"), ("snake", "silu"), 4),
    model("21 odd activation", d.config(hidden_act=["silu"]), ("hidden_act", "gelu"), 4),
    model("22 config", d.config(quantization_config={"quant_method": "x"}), ("dequantise",), 4),
    model("22 config of MLX", d.config(quantization={"bits": 4}), ("dequantise",), 4),
    model("22 int8", d.tensor(UP, d.quantised, "as int8"), (UP, "I8", "dequantise"), 4),
    model(
        "22 fp8",
        d.tensor(UP, lambda w: w.to(torch.float8_e4m3fn), "as fp8"),
        (UP, "F8_E4M3"),
        4,
    ),
    model(
        "22 packed",
        d.then(d.tensor(UP), d.tensor(UP.replace("weight", "qweight"), torch.ones(4, 96).int())),
        ("qweight", "I32", "dequantise"),
        4,
    ),
    model(
        "23 mixed dtypes",
        d.then(
            d.tensor(UP, lambda w: w.bfloat16(), "as bfloat16"),
            d.tensor(QUERY, lambda w: w.half(), "as float16"),
        ),
        ("BF16", "F16", "F32", "float32"),
        0,
    ),
    model(
        "24 tied, another head stored",
        d.config(tie_word_embeddings=True),
        ("tied by config.json", HEAD, "stored head is used"),
        0,
    ),
    model(
        "24 tied, no head stored",
        d.then(d.config(tie_word_embeddings=True), d.tensor(HEAD)),
        (),
        0,
    ),
]


def _copy(folder: Path, name: str, to: str) -> None:
    (folder / to).write_bytes((folder / name).read_bytes())


def _both(folder: Path) -> None:
    _copy(folder, SINGLE, "x")
    d.split(folder)
    (folder / "x").rename(folder / SINGLE)


# --- shapes, tokenizers, texts -------------------------------------------------------------------


def _ids(count: int, most: int) -> bytes:
    rows = ([(7 * row + 3 * n) % most for n in range(80)] for row in range(count))
    return b"".join(json.dumps({"input_ids": row}).encode() + b"\n" for row in rows)


def pretokenised(place: Place) -> Done:
    """Convert on rows of token ids."""
    return noted(place, "--calibration", place.root / "ids.jsonl", "--text-field", "input_ids")


def overflow(folder: Path) -> None:
    for name in (UP, DOWN):
        for layer in (0, 1):
            own = name.replace("layers.1", f"layers.{layer}")
            d.tensor(own, lambda w: w * 1e30)(folder)


def sentence(number: int) -> str:
    return f"The {number} old stones near the river are quiet today."


def report_on_calibration(place: Place) -> Done:
    """Convert, then evaluate on the calibration text."""
    done = place.convert("--tokens", "16384", "--sequence-length", "64")
    if done.code:
        return done
    few = ("--tokens", "200", "--sequence-length", "64", "--quick", "--no-controls")
    done = place.run("report", place.out, "--text", place.text, *few)
    said = [line for line in done.out.splitlines() if line.startswith("Warning")]
    return Done(done.code, "", "\n".join(said) or done.err)


THIN = "--tokens 64 --sequence-length 8 --experts 2 --top-k 1 --target mixtral".split()
NO_TOKENIZER = d.remove("tokenizer.json", "tokenizer_config.json")
CASES += [
    usage(
        "25 seven experts",
        ["--experts", "7", "--target", "mixtral"],
        ("divides 96", "2, 3, 4, 6, 12"),
    ),
    usage("25 one expert", ["--experts", "1"], ("--experts is 1",)),
    usage(
        "25 more chosen than there are",
        ["--experts", "4", "--top-k", "5"],
        ("at most 4",),
    ),
    usage("25 revision of a folder", ["--revision", "v1"], ("--revision v1", "is a folder")),
    usage("25 all shared", ["--experts", "8", "--shared-fraction", "0.99"], ("nearest",)),
    usage("25 shared above all", ["--shared-fraction", "1.5"], ("--shared-fraction is 1.5",)),
    usage(
        "26 width and count",
        ["--experts", "12", "--top-k", "4", "--target", "qwen2_moe"],
        ("no multiple of 128", "vLLM", "no power of two"),
        0,
    ),
    late("27 no tokenizer", NO_TOKENIZER, ("tokenizer", "copy")),
    late("27 broken tokenizer", d.cut("tokenizer.json", 1000), ("tokenizer",)),
    Case(
        "27 no tokenizer, ids given",
        f"{NO_TOKENIZER.words}; rows of ids as --calibration",
        (),
        0,
        lambda place: [
            NO_TOKENIZER(place.model),
            (place.root / "ids.jsonl").write_bytes(_ids(20, 128)),
        ],
        pretokenised,
        leaves=("out",),
    ),
    late("28 id beyond the embeddings", d.piece("e", 500), ("500", "128")),
    late("28 more pieces than embeddings", d.more_pieces(3), ("131 pieces", "128 embeddings")),
    Case(
        "28 given id beyond the embeddings",
        "rows of ids up to 200 as --calibration",
        ("id 1", "128 embeddings"),
        3,
        lambda place: (place.root / "ids.jsonl").write_bytes(_ids(20, 200)),
        pretokenised,
    ),
    calibration("29 missing", "no such file", "t.txt", None, ("no such file",)),
    calibration("29 empty", "0 bytes", "t.txt", b"", ("t.txt", "no text")),
    calibration("29 blank", "line ends alone", "t.txt", b" \n\n \n", ("t.txt", "no text")),
    calibration(
        "29 too short", "200 characters", "t.txt", b"a river and a stone " * 10, ("at least 8",)
    ),
    calibration("29 binary", "an ELF file", "t.txt", b"\x7fELF\0\0" * 999, ("t.txt", "binary")),
    calibration(
        "29 not UTF-8", "Latin-1", "t.txt", "Müller".encode("latin-1") * 999, ("t.txt", "UTF-8")
    ),
    calibration(
        "29 no text field",
        "99 rows without `text`",
        "t.jsonl",
        b'{"body": "x"}\n' * 99,
        ("body", "text"),
    ),
    calibration("29 no JSON", "JSONL of plain text", "t.jsonl", b"text\n" * 99, ("line 1", "JSON")),
    calibration(
        "29 rows too short",
        "99 rows of one letter",
        "t.jsonl",
        b'{"text": "x"}\n' * 99,
        ("1 documents", "at least 8"),
    ),
    Case(
        "29 pipe in a folder",
        "a folder with a named pipe t.txt alone",
        ("no text",),
        3,
        lambda place: [(place.root / "texts").mkdir(), os.mkfifo(place.root / "texts" / "t.txt")],
        lambda place: place.convert("--calibration", place.root / "texts"),
    ),
    calibration(
        "30 smaller than asked for",
        "a text of 20 sentences; --tokens 1024",
        "t.txt",
        "\n\n\n".join(map(sentence, range(20))).encode(),
        ("asked for 1,024 tokens", "the text gave"),
        0,
        *("--tokens", "1024", "--sequence-length", "64"),
    ),
    calibration(
        "30 duplicates",
        "every document twice",
        "t.txt",
        "\n\n\n".join(sentence(n % 60) for n in range(120)).encode(),
        ("60 of 120 documents are duplicates",),
        0,
    ),
    Case(
        "30 evaluated on its calibration text",
        "moefy report --text CALIBRATION",
        ("Warning: ", "stands word for word in the calibration text"),
        0,
        lambda place: None,
        report_on_calibration,
        leaves=("out",),
    ),
    usage(
        "31 few tokens",
        THIN,
        ("experts got fewer calibration tokens than they have neurons", "--tokens"),
        0,
    ),
    usage(
        "31 few tokens, strict",
        [*THIN, "--strict"],
        ("--strict", "fewer calibration tokens", "--tokens"),
        6,
    ),
    late(
        "32 overflow",
        Damage("up_proj and down_proj of both layers times 1e30", overflow),
        ("overflow",),
        6,
    ),
    late(
        "32 overflow that enters a layer",
        Damage("up_proj and down_proj of both layers times 1e30; --layers 1:", overflow),
        ("layer 1", "token 0"),
        6,
        *("--layers", "1:"),
    ),
]
