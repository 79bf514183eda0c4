"""OLMo 3: OLMo 2 with a sliding window in most layers, which its MoE sibling lacks."""

from __future__ import annotations

import dataclasses

from moefy.models.families import olmo2

FAMILY = dataclasses.replace(
    olmo2.FAMILY,
    model_type="olmo3",
    targets=(),
    missing_feature="norms on whole queries and keys together with sliding windows",
)
