"""InternLM 3: Llama under a name of its own."""

import dataclasses

from moefy.models.families import llama
from moefy.models.families.family import FFN_BIASES

FAMILY = dataclasses.replace(llama.FAMILY, refused=dict.fromkeys(("mlp_bias", "bias"), FFN_BIASES))
