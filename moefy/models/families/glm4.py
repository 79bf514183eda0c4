"""GLM-4 0414: GLM-4 9B with norms behind attention and FFN as well."""

import dataclasses

from moefy.models.families import glm

FAMILY = dataclasses.replace(
    glm.FAMILY,
    targets=(),
    missing_feature="norms before and behind attention and FFN without more",
    rest=None,
    canonical=lambda config: config,
    join=lambda layer: layer.post_mlp_layernorm,
)
