"""CamemBERT: RoBERTa for French."""

from moefy.models.families.roberta import FAMILY as FAMILY
