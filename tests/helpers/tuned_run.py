"""What a fine-tune has left in its folder."""

import json

from safetensors.torch import load_file


def weights(folder):
    return load_file(folder / "model.safetensors")


def rows(folder):
    """All rows of the log."""
    return [json.loads(row) for row in (folder / "moefy/finetune.jsonl").read_text().splitlines()]


def step_rows(folder):
    """Those of steps and of the guard, without those of the validation text."""
    return [row for row in rows(folder) if "validation" not in row]
