"""Gemma 3: norms before and behind the FFN and two rotary frequencies, which no MoE class has.

Gemma 4's MoE class has the norms, but norms the routed experts' output by itself.
"""

import dataclasses

from moefy.models.families import gemma2

FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    missing_feature="norms before and behind the FFN, and two rotary frequencies",
)
