"""CWM: Llama 3 with a sliding window on three of four layers."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family("cwm", targets=("qwen2_moe",), windows="some")
