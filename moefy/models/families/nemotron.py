"""Nemotron 3 and 4, Minitron: a squared ReLU in place of the gate, norms with a bias."""

from moefy.models.families.arcee import FAMILY as FAMILY
