"""fastgen in a few lines: optimise a model, generate, stream a chat, see what was rewritten.

Runs offline on the tiny model that comes with fastgen: python examples/quickstart.py
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fastgen

folder = Path(__file__).parent / "demo_model"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

fastgen.optimize(model)

inputs = tokenizer(["def read_file(path):\n", "import "], return_tensors="pt", padding=True)
outputs = model.generate(**inputs, max_new_tokens=32)
print(*tokenizer.batch_decode(outputs, skip_special_tokens=True), sep="\n---\n")

engine = fastgen.Engine(model, tokenizer)
messages = [{"role": "user", "content": "Write a Python function `add(a, b)`: Add two numbers."}]
request = engine.submit(messages, fastgen.SamplingParams(max_tokens=48, temperature=0))
print("---")
for event in engine.stream(request):
    print(event.text, end="", flush=True)

print("\n---")
print(fastgen.explain(model))
