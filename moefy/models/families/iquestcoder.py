"""IQuest-Coder: Llama under a name of its own."""

from moefy.models.families.llama import FAMILY as FAMILY
