"""CWM: Llama 3 with a sliding window on three of four layers."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen2_moe",), windows="some")
