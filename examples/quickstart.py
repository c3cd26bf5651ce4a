"""Quantise a language model to 4 bits, compile it, generate: `python examples/quickstart.py MODEL`."""

import sys

import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

from aaac_ao import AAACConfig

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
quantize_(model.model, AAACConfig(format="nvfp4"))
model.forward = torch.compile(model.forward, fullgraph=True)
prompt = tokenizer("def main(", return_tensors="pt").input_ids
tokens = model.generate(prompt, max_new_tokens=20, do_sample=False, cache_implementation="static", pad_token_id=0)
print(tokenizer.decode(tokens[0]))
