"""mT5: T5 for many languages."""

from moefy.models.families.t5 import FAMILY as FAMILY
