"""VaultGemma: Gemma 2 without the norms behind attention and FFN."""

import dataclasses

from moefy.models.families import gemma2

FAMILY = dataclasses.replace(gemma2.FAMILY, missing_feature="capped logits", join=None)
