"""Cohere 2 (Command R7B, Command A): attention and FFN side by side behind one norm."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("cohere2_moe",), windows="some")
