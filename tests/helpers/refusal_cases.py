"""What the commands behind `convert` refuse: a damaged run, a text, a setting, a place.

Every row is one command line, run in a folder that holds what `moefy run small.toml out` makes, a
text and some things that are in the way. `tests/cli/test_refusals.py` runs it.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import damage as d
from damage import CONFIG, SINGLE, Damage

REPORT, TUNED = "moefy/conversion.json", "moefy/finetune.json"
RECIPE, TOKENS = "moefy/recipe.toml", "moefy/calibration.safetensors"

FEW = "--tokens 512 --sequence-length 64 --batch-size 2 --set validation_tokens=128"
QUICK = "--tokens 128 --sequence-length 64 --quick --no-controls --no-speed"
WHOLE = {
    "finetune": f"finetune out --out new --data text.txt {FEW} --quiet",
    "report": f"report out --text text.txt {QUICK} --quiet",
    "verify": "verify out --quiet",
    "push": "push out owner/name --dry-run --quiet",
    "run": "run small.toml out --quiet",
    "export": "export gguf out new.gguf --quantize f32 --quiet",
}
"""Command lines that do what they should; rows change the folder or add to the line."""


@dataclass(frozen=True)
class Refusal:
    """A command line, and how it ends."""

    line: str
    code: int
    says: tuple[str, ...]
    damage: Damage | None = None
    """What is done first to the folder that the line names."""

    @property
    def name(self) -> str:
        words = self.line.replace("--quiet", "").replace(FEW, "").replace(QUICK, "")
        return f"{words}; {self.damage.words}" if self.damage else words


def damaged(damage: Damage, rows: dict[str, tuple], folder: str = "out") -> list[Refusal]:
    """Rows of one damage, by the commands that refuse it alike: `(code, words ...)`."""
    return [
        Refusal(WHOLE[command].replace(" out ", f" {folder} "), code, says, damage)
        for commands, (code, *words) in rows.items()
        for command in commands.split()
        for says in [tuple(words)]
    ]


def given(command: str, code: int, rows: dict[str, tuple[str, ...]]) -> list[Refusal]:
    """Rows of options that are added to a whole line; what is given later counts, but for texts,
    which are in place of its own."""
    whole = WHOLE[command]
    bare = whole.replace("--data text.txt ", "")
    return [
        Refusal(f"{bare if '--data' in flags else whole} {flags}", code, says)
        for flags, says in rows.items()
    ]


def lines(code: int, rows: dict[str, tuple[str, ...]]) -> list[Refusal]:
    return [Refusal(f"{line} --quiet", code, says) for line, says in rows.items()]


DENSE = {
    "compiled": d.before("_orig_mod."),
    "unmerged": d.renamed("base_layer", lambda name: name.replace("proj.", "proj.base_layer.")),
    "reward": d.config(architectures=["LlamaForSequenceClassification"]),
    "adapted": d.write("adapter_config.json", "{}"),
    "adapter": d.then(
        d.write("adapter_config.json", "{}"),
        d.moved(SINGLE, "adapter_model.safetensors"),
        d.remove(CONFIG),
    ),
    "headless": d.tensor(d.HEAD),
}
"""Dense models that are none to learn from or to compare with."""


def no_dense(command: str, flag: str) -> list[Refusal]:
    """Rows of these models, given to a command."""
    rows = {
        "compiled": (3, "_orig_mod", "torch.compile", "inside"),
        "unmerged": (3, "base_layer", "PEFT", "merge_and_unload"),
        "reward": (4, "LlamaForSequenceClassification", "no next token"),
        "adapted": (4, "adapter_config.json", "merge_and_unload"),
        "adapter": (3, "adapter", "no model by itself"),
        "headless": (3, "no head (lm_head.weight)", "no next token"),
    }
    return [
        row
        for folder, (code, *says) in rows.items()
        for row in given(command, code, {f"{flag} {folder}": tuple(says)})
    ]


def arrange(place: Path) -> None:
    """Lay out what rows name: texts that are none, and places that are taken."""
    (place / "empty.txt").write_bytes(b"")
    (place / "short.txt").write_text("A river.")
    (place / "elf.txt").write_bytes(b"\x7fELF\0\0" * 999)
    (place / "latin.txt").write_bytes("Müller".encode("latin-1") * 999)
    (place / "body.jsonl").write_text('{"body": "x"}\n' * 99)
    (place / "prompts.jsonl").write_text('{"prompt": 3}\n')
    (place / "half.toml").write_text("model = ")
    (place / "other.toml").write_text("[finetune]\nbatch = 1\n")
    os.mkfifo(place / "pipe")
    for folder in ("empty", "full"):
        (place / folder).mkdir()
    (place / "full" / "thesis.tex").write_text("mine")
    (place / "link").symlink_to("full")
    for folder, damage in DENSE.items():
        damage(Path(shutil.copytree(place / "model", place / folder)))


# --- a folder that is no whole run ---------------------------------------------------------------


def instead(words: str, put: Callable[[Path], object]) -> Damage:
    """Something else in the place of the run's folder."""

    def do(folder: Path) -> None:
        shutil.rmtree(folder)
        put(folder)

    return Damage(words, do)


def dense(folder: Path) -> None:
    shutil.copytree(folder.parent / "model", folder)


READ = "finetune report"
COMPARED = "verify push"
ROUTER = "model.layers.0.mlp.gate.weight"
FOLDERS = [
    *damaged(
        instead("gone", lambda folder: None),
        {f"{READ} {COMPARED} export": (3, "not a whole run", "no such folder")},
    ),
    *damaged(
        instead("a file", lambda folder: folder.write_text("mine")),
        {f"{READ} {COMPARED} export": (3, "not a whole run", "a file")},
    ),
    *damaged(
        instead("empty", Path.mkdir),
        {f"{READ} {COMPARED} export": (3, "not a whole run", "an empty folder")},
    ),
    *damaged(
        instead("dense", dense),
        {f"{READ} {COMPARED} export": (3, "a dense model: convert it first")},
    ),
    *damaged(d.remove(TUNED), {COMPARED: (3, "not as the run wrote it", SINGLE)}, "out-finetuned"),
    *[
        row
        for damage, *says in (
            (d.cut(TUNED, 100), TUNED, "cannot be used"),
            (d.write(TUNED, "[]"), TUNED, "object"),
            (d.write(TUNED, "{}"), "finetune.json"),
            (d.pipe(TUNED), TUNED, "not a regular file"),
            (d.config(TUNED, outputs=[]), "finetune.json", "outputs"),
            (d.config(TUNED, tokens="many"), "finetune.json", "tokens"),
        )
        for row in damaged(
            damage, {f"{READ} {COMPARED}": (3, "not a whole run", *says)}, "out-finetuned"
        )
    ],
]
FILES = [
    *[
        row
        for damage, *says in (
            (d.remove(REPORT), REPORT, "cannot be found"),
            (d.cut(REPORT, 100), REPORT, "cannot be used"),
            (d.write(REPORT, "[]"), REPORT, "object"),
            (d.write(REPORT, "{}"), "conversion.json"),
            (d.write(REPORT, '{"a": ' * 10_000), REPORT),
            (d.write(REPORT, b"\xff"), REPORT),
            (d.pipe(REPORT), REPORT, "not a regular file"),
            (d.config(REPORT, family=...), "family"),
            (d.config(REPORT, family=["llama"]), "family"),
            (d.config(REPORT, family="../llama"), "'../llama'"),
            (d.config(REPORT, shape=None), "shape"),
            (d.config(REPORT, shape={}), "shape.num_neurons"),
            (d.config(REPORT, layers="many"), "layers"),
            (d.config(REPORT, calibration=3), "calibration"),
            (d.config(REPORT, outputs=3), "outputs"),
        )
        for row in damaged(damage, {f"{READ} {COMPARED}": (3, "not a whole run", *says)})
    ],
    *damaged(
        d.remove(CONFIG),
        {
            f"{READ} export run": (3, CONFIG, "cannot be found"),
            COMPARED: (3, "lacks config.json"),
        },
    ),
    *damaged(
        d.cut(CONFIG, 40),
        {
            f"{READ} export": (3, CONFIG, "cannot be used"),
            COMPARED: (3, "not as the run wrote it", CONFIG),
        },
    ),
    *damaged(
        d.config(auto_map={"AutoModelForCausalLM": "model.Model"}),
        {
            f"{READ} export": (4, CONFIG, "auto_map"),
            COMPARED: (3, "not as the run wrote it", CONFIG),
        },
    ),
    *damaged(
        d.remove(RECIPE), {READ: (3, "not a whole run", RECIPE), COMPARED: (3, f"lacks {RECIPE}")}
    ),
    *damaged(
        d.cut(RECIPE, 30),
        {
            READ: (3, RECIPE, "not TOML"),
            COMPARED: (3, "not as the run wrote it", RECIPE),
            "run": (3, RECIPE, "not TOML"),
        },
    ),
    *[
        row
        for damage, *says in (
            (d.write(RECIPE, "active = 'half'\n"), "not a whole run"),
            (d.write(RECIPE, "colour = 3\n"), "not a whole run"),
            (d.write(RECIPE, ""), "not a whole run"),
            (d.pipe(RECIPE), "not a whole run", RECIPE, "not a regular file"),
            (d.write(SINGLE, b""), SINGLE, "0 bytes"),
            (d.pipe(SINGLE), SINGLE, "not a regular file"),
            (d.pipe("tokenizer.json"), "tokenizer.json", "not a regular file"),
            (d.write(TOKENS, b"{}"), TOKENS, "2 bytes"),
            (d.pipe(TOKENS), TOKENS, "not a regular file"),
        )
        for row in damaged(damage, {READ: (3, *says)})
    ],
    *[
        row
        for damage in (d.write(CONFIG, "[]"), d.pipe(CONFIG))
        for row in damaged(damage, {f"{READ} export": (3, CONFIG)})
    ],
    *damaged(
        d.remove(SINGLE),
        {
            f"{READ} export": (3, f"holds no {SINGLE}"),
            "run": (3, f"holds no {SINGLE}", "--force"),
            COMPARED: (3, f"lacks {SINGLE}"),
        },
    ),
    *damaged(
        d.sharded(d.remove(d.SHARDS[1])),
        {f"{READ} export": (3, f"lacks {d.SHARDS[1]}"), "run": (3, d.SHARDS[1], "--force")},
    ),
    *damaged(
        d.cut(SINGLE, 50_000),
        {
            f"{READ} export": (3, SINGLE, "not a whole safetensors file", "50000"),
            "run": (3, SINGLE, "not a whole safetensors file", "--force"),
            COMPARED: (3, "not as the run wrote it", SINGLE),
        },
    ),
    *damaged(
        d.tensor(ROUTER, d.first_value(float("nan")), "three values NaN"),
        {
            "report": (6, "no finite likelihood", "moefy verify out"),
            "finetune": (6, "loss before training is nan", "moefy verify RUN"),
            COMPARED: (3, "not as the run wrote it", SINGLE),
        },
    ),
    *damaged(
        d.append(SINGLE, b"more"),
        {READ: (3, SINGLE, "end at byte"), COMPARED: (3, "not as the run wrote it", SINGLE)},
    ),
    *[
        row
        for damage in (d.config(hidden_size=-1), d.config(num_experts=10**9))
        for row in damaged(damage, {READ: (3, "transformers cannot open out", CONFIG)})
    ],
    *[
        row
        for damage in (d.config(moe_intermediate_size="wide"), d.config(num_experts=None))
        for row in damaged(damage, {READ: (3, f"transformers cannot open out/{CONFIG}")})
    ],
    *damaged(
        Damage("one shard more", lambda f: shutil.copy(f / SINGLE, f / "more.safetensors")),
        {COMPARED: (3, "more.safetensors", "did not write")},
    ),
    *damaged(
        d.remove("tokenizer.json", "tokenizer_config.json"),
        {
            READ: (3, "no tokenizer that loads", "copy"),
            "run": (3, "lacks tokenizer.json", "--force"),
            COMPARED: (3, "lacks tokenizer.json, tokenizer_config.json"),
        },
    ),
    *damaged(
        d.cut("tokenizer.json", 100),
        {
            READ: (3, "no tokenizer that loads", "copy"),
            COMPARED: (3, "not as the run wrote it", "tokenizer.json"),
        },
    ),
    *damaged(
        d.remove(TOKENS),
        {READ: (3, TOKENS, "cannot be found"), COMPARED: (3, f"lacks {TOKENS}")},
    ),
    *damaged(
        d.cut(TOKENS, 300),
        {
            READ: (3, TOKENS, "not a whole safetensors file"),
            COMPARED: (3, "not as the run wrote it", TOKENS),
        },
    ),
]

ODD = [
    d.config(model_type=7),
    d.config(model_type="no-such-type"),
    d.config(num_hidden_layers=10**6),
    d.config(num_hidden_layers="two"),
    d.config(hidden_size=-1),
    d.config(num_experts=10**9),
    d.config(num_experts=None),
    d.config(moe_intermediate_size="wide"),
]
"""Values that a command may do without, and that no command ends in a traceback over."""
BROKEN = list({case.damage.words: case.damage for case in FILES if case.damage}.values())
"""Each damage of a run's files once."""
CASES = [*FOLDERS, *FILES]


# --- texts ---------------------------------------------------------------------------------------

CASES += [
    *given(
        "finetune",
        3,
        {
            "--data none.txt": ("none.txt: no such file",),
            "--data empty.txt": ("empty.txt", "no text"),
            "--data short.txt": ("short.txt: 8 tokens", "at least 8"),
            "--data elf.txt": ("elf.txt: binary", "UTF-8"),
            "--data latin.txt": ("latin.txt: not UTF-8 at byte 1",),
            "--data body.jsonl": ("body.jsonl, line 1: no field 'text'", "'body'"),
            "--data empty": ("empty", "no text"),
            "--answers none.jsonl --tokens 2048": ("none.jsonl: no such file", "expected rows"),
            "--answers-only": ("text.txt has no conversation", "'messages'"),
            "--data pipe": ("pipe: neither a file nor a folder",),
            "--batch-size 1000000": ("a step takes 1000000", "lower --batch-size"),
            "--teacher none": ("none: no such folder", "HF_HUB_OFFLINE"),
            "--teacher text.txt": ("text.txt is a file", "config.json"),
            "--teacher empty": ("empty/config.json cannot be found",),
        },
    ),
    *given(
        "report",
        3,
        {
            "--text none.txt": ("none.txt: no such file",),
            "--text empty.txt": ("empty.txt: 0 tokens", "at least 64"),
            "--text short.txt": ("short.txt: 7 tokens", "at least 64"),
            "--text elf.txt": ("elf.txt: binary", "UTF-8"),
            "--text latin.txt": ("latin.txt: not UTF-8 at byte 1",),
            "--text pipe": ("pipe: no such file",),
            "--prompts none.jsonl": ("none.jsonl",),
            "--prompts empty.txt": ("empty.txt", "expected rows such as"),
            "--prompts prompts.jsonl": ("prompts.jsonl, line 1: no prompt",),
            "--against empty": ("empty is not a whole run",),
            "--dense none": ("none: no such folder",),
            "--dense text.txt": ("text.txt is a file",),
            "--redraw": ("report.json",),
        },
    ),
]


CASES += [*no_dense("finetune", "--teacher"), *no_dense("report", "--dense")]


# --- settings ------------------------------------------------------------------------------------

CASES += [
    *given(
        "finetune",
        2,
        {
            "--data a:1 --data a:2": ("--data names a twice",),
            "--data a:1 --data b": ("--data b has no share", "like b:0.5"),
            "--data text.txt:9 --data latin.txt:1": ("share of 0.1 is", "raise the share"),
            "--answers prompts.jsonl:0.5": ("text.txt has no share", "like "),
            "--train lots": ("--train is 'lots'", "router+experts"),
            "--balance x": ("--balance is 'x'", "switch"),
            "--compute-dtype int4": ("--compute-dtype is 'int4'", "bfloat16"),
            "--log-to x": ("--log-to is 'x'; expected one of tensorboard",),
            "--device gpu": ("--device is 'gpu'; expected auto, cpu",),
            "--learning-rate nan": ("--learning-rate is nan; expected at least 0",),
            "--kl inf": ("--kl is inf", "a number from 0"),
            "--set lora_rank=0": ("lora_rank is 0; expected at least 1",),
            "--set capacity_factor=1e29": ("capacity_factor is 1e+29", "at most 1e+06"),
            "--seed 4294967296": ("--seed is 4,294,967,296",),
            "--set fsdp=2": ("fsdp is 2, and there is 1 process", "--nproc-per-node=2"),
            "--set fsdp=3 --set router_gradient=chosen --set expert_parallel=2": (
                "expected a number that",
            ),
            "--tokens 8": ("--tokens is 8; expected at least 64",),
            "--sequence-length 4": ("--sequence-length is 4; expected at least 8",),
            "--steps 0": ("--steps is 0; expected at least 1",),
            "--steps 3": ("--steps 3 and --tokens 512; expected one of them",),
            "--kl 0 --ce 0": ("nothing to learn from",),
            "--preset slow": ("--preset is 'slow'; expected one of fast, good, best",),
            "--preset fast --steps 3": ("--steps with --preset fast", "give --tokens"),
            "--set lora_rank=0 --train lora": ("lora_rank is 0", "at least 1"),
            "--seed 99999999999999999999": ("--seed is", "at most"),
            "--set top_p=2": ("top_p is 2", "at most 1"),
            "--set sede=3": ("unknown [finetune] key 'sede'", "did you mean seed"),
            "--set seed": ("no `=`", "key=value"),
            "--set tokens=many": ("tokens is 'many'", "int"),
            "--set hidden=1 --teacher-cache c": ("hidden", "--teacher-cache", "drop one"),
            "--set expert_parallel=2": ("--set fsdp=PROCESSES",),
            "--recipe none.toml": ("none.toml: No such file",),
            "--recipe half.toml": ("half.toml is not TOML",),
            "--recipe other.toml": ("unknown [finetune] key 'batch'", "did you mean batch_size"),
            "--recipe empty": ("recipe empty: Is a directory",),
        },
    ),
    *given("finetune", 5, {"--device cuda": ("--device cuda: 0 CUDA devices found",)}),
    *given(
        "report",
        2,
        {
            "--against nowhere": ("'nowhere' is no folder of a run and no method", "key=value"),
            "--fail-if dnll=0": ("cannot be understood", "dnll>0.1"),
            "--fail-if dnl>0": ("unknown dnl", "did you mean dnll"),
            "--tasks a --include-path nowhere": ("nowhere is no folder",),
            "--full": ("--quick and --full", "one of them"),
            "--limit 0": ("--limit is 0", "at least 1"),
            "--tokens 0": ("--tokens is 0", "at least 64"),
            "--tokens 1 --sequence-length 32": ("--tokens is 1", "at least 32"),
            "--sequence-length 0": ("--sequence-length is 0", "at least 8"),
            "--sequence-length 1": ("--sequence-length is 1", "at least 8"),
            "--device gpu": ("--device is 'gpu'; expected auto, cpu",),
        },
    ),
    *given("report", 5, {"--device cuda": ("--device cuda: 0 CUDA devices found",)}),
    *lines(
        2,
        {
            "push out a/b/c --dry-run": ("'a/b/c' is not a repository name", "owner/name"),
            "push out ../x": ("'../x' is not a repository name",),
            "push out": ("repo",),
            "verify": ("run",),
            "report": ("run",),
            "export gguf out new.gguf --quantize q8": ("--quantize is 'q8'", "did you mean q8_0"),
            "export onnx out": ("onnx",),
            "run none.toml out": ("none.toml: No such file",),
            "run empty out": ("empty: Is a directory",),
            "run half.toml out": ("half.toml is not TOML",),
            "run other.toml out": ("no MODEL given",),
        },
    ),
    *lines(4, {"export gguf out new.gguf --quantize q8_0": ("q8_0 packs 32 weights", "f16")}),
    *lines(5, {"push out owner/name": ("HF_HUB_OFFLINE",)}),
]


# --- places --------------------------------------------------------------------------------------

CASES += [
    *given(
        "finetune",
        2,
        {
            "--out text.txt": ("OUT ", "text.txt is a file"),
            "--out text.txt --force": ("OUT ", "text.txt is a file"),
            "--out link --force": ("OUT ", "link is a file or a link"),
            "--out full": ("OUT ", "full exists already", "--force"),
            "--out full --force": ("OUT ", "full holds files that moefy did not write"),
            "--out out": ("OUT ", "out exists already"),
            "--out out --force": ("OUT ", "out is the run itself"),
        },
    ),
    *given(
        "finetune",
        5,
        {
            "--out text.txt/new": ("text.txt", "Not a directory"),
            f"--out {'x' * 300}": ("too long",),
            "--teacher-cache text.txt": ("text.txt: File exists",),
        },
    ),
    *lines(
        2,
        {
            "export gguf out text.txt": ("OUT", "text.txt exists already", "--force"),
            "export gguf out full": ("full is a folder", "a file"),
            "export gguf out full --force": ("full is a folder",),
            "export gguf out none/new.gguf": ("none/new.gguf lies in a folder that is not there",),
            "run small.toml text.txt": ("OUT ", "text.txt is a file"),
            "run small.toml full": ("OUT ", "full exists already", "--force"),
            "run small.toml full --force": ("OUT ", "full holds files that moefy did not write"),
        },
    ),
]
