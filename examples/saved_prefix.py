"""A long system prompt costs nothing after a restart: its blocks are saved to a file, and another process loads them.

Run it as `python examples/saved_prefix.py [MODEL]`: a folder or an id on the hub; without one, the model in the package. It
runs itself once more, as the restarted program.
"""

import inspect
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_cache import BlockPool, ContinuousBatcher, InvalidRequestError
from paged_cache.assets import MODEL_PATH

name = sys.argv[1] if len(sys.argv) > 1 else str(MODEL_PATH)
path = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp()) / "prefixes.safetensors"
is_restarted = path.exists()

tokenizer = AutoTokenizer.from_pretrained(name)
model: Any = AutoModelForCausalLM.from_pretrained(name)
pool = BlockPool.for_model(model, memory="64MB")
print("--- after the restart" if is_restarted else "--- first start", flush=True)

# A file of another model, adapter, dtype or version is refused before anything is changed.
try:
    start = time.perf_counter()
    loaded = pool.load_prefixes(path)
    print(f"{loaded} tokens loaded in {(time.perf_counter() - start) * 1e3:.0f} ms")
except InvalidRequestError as error:
    print(f"nothing to load: {type(error).__name__}: {str(error).replace(str(path), path.name)}")

system = inspect.getsource(textwrap)[:1500]
with ContinuousBatcher(model, pool, tokenizer=tokenizer) as batcher:
    output = batcher.generate([system + "\n\ndef wrap("], max_new_tokens=8, do_sample=False, progress_bar=False)[0]
num_computed = len(output.prompt_ids) - output.cached_tokens
print(f"{num_computed} of {len(output.prompt_ids)} prompt tokens computed, answer: {output.text!r}")

if not is_restarted:
    print(f"{pool.save_prefixes(path)} tokens saved, {path.stat().st_size / 1e6:.1f} MB", flush=True)
    subprocess.run([sys.executable, __file__, name, str(path)], check=True, timeout=200)
    path.unlink()
    path.parent.rmdir()
