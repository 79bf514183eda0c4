"""VaultGemma: Gemma 2 without the norms behind attention and FFN."""

from __future__ import annotations

import dataclasses

from moefy.models.families import gemma2

FAMILY = dataclasses.replace(
    gemma2.FAMILY, model_type="vaultgemma", missing_feature="capped logits", join=None
)
