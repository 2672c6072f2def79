"""The first token of a fresh process, and what it took. `startup` runs the text of this file: it imports what a user would."""

import json
import sys
import time
from typing import Any

START = time.perf_counter()


def main(way: str, settings: dict[str, Any]) -> None:
    """Prints one line of JSON: seconds for imports, model and first token, and the token."""
    import torch
    from transformers import AutoModelForCausalLM

    if way != "plain":
        import paged_cache
    imported = time.perf_counter()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))
    model = model.to(settings["device"]).eval()
    loaded = time.perf_counter()
    prompt = list(settings["prompt"])
    if way == "batcher":
        with paged_cache.ContinuousBatcher(model, paged_cache.BlockPool.for_model(model, num_blocks=64)) as batcher:
            (output,) = batcher.generate([prompt], max_new_tokens=1, do_sample=False, progress_bar=False)
            tokens = list(output.generated_tokens)
    else:
        options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
        ids = torch.tensor([prompt], device=model.device)
        if way == "paged":
            paged_cache.patch(model)
            options["past_key_values"] = paged_cache.PagedCache(paged_cache.BlockPool.for_model(model, num_blocks=64))
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    end = time.perf_counter()
    times = {"import_s": imported - START, "load_s": loaded - imported, "first_token_s": end - loaded}
    sys.stdout.write(json.dumps(times | {"tokens": tokens}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
