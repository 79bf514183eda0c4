"""Nemotron 3 and 4, Minitron: a squared ReLU in place of the gate, norms with a bias."""

from __future__ import annotations

import dataclasses

from moefy.models.families import arcee

FAMILY = dataclasses.replace(arcee.FAMILY, model_type="nemotron")
