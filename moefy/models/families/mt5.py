"""mT5: T5 for many languages."""

from __future__ import annotations

import dataclasses

from moefy.models.families import t5

FAMILY = dataclasses.replace(t5.FAMILY, model_type="mt5")
