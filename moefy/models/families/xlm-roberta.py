"""XLM-RoBERTa: RoBERTa for many languages."""

from moefy.models.families.roberta import FAMILY as FAMILY
