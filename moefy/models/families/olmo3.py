"""OLMo 3: OLMo 2 with a sliding window in most layers, which its MoE sibling lacks."""

import dataclasses

from moefy.models.families import olmo2

FAMILY = dataclasses.replace(
    olmo2.FAMILY,
    targets=(),
    missing_feature="norms on whole queries and keys together with sliding windows",
)
