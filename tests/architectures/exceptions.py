"""What the sweep leaves out, and why: only what fails with transformers' own DynamicCache as well."""

STAND_ALONE = "no generator of its own: its layers read the keys and values of another model"
OWN_CACHE = "takes no cache but its own class"
NO_CACHE = "has no cache at all"
IGNORES_CACHE = "silently ignores the cache that it is given"
CODEBOOKS = "its generate knows greedy search and sampling only"

# Architectures that cannot generate with a DynamicCache at all.
LEFT_OUT = {
    "gemma4_assistant": STAND_ALONE,
    "gemma4_unified_assistant": STAND_ALONE,
    "minimax": OWN_CACHE,
    "openai-gpt": NO_CACHE,
    "reformer": OWN_CACHE,
    "rwkv": IGNORES_CACHE,
    "xlm": NO_CACHE,
    "xlnet": OWN_CACHE,
    "xlstm": OWN_CACHE,
    "itt:diffusion_gemma": "generates by diffusion of whole blocks, not token by token",
    "itt:pi0": "moves a robot and has no generate",
    "s2s:voxtral_realtime": "needs a stream of audio and takes no text alone",
}

# Checks that one architecture cannot pass with a DynamicCache, by check.
CHECKS_LEFT_OUT = {
    "second turn": {
        "blt": "fails on several tokens after a filled cache, as its patches start anew",
        "musicgen": "returns its codebooks in another shape than it takes them",
        "musicgen_melody": "returns its codebooks in another shape than it takes them",
        "prophetnet": "refuses several tokens after a filled cache",
        "s2s:prophetnet": "refuses several tokens after a filled cache",
    },
    "beam search": {"musicgen": CODEBOOKS, "musicgen_melody": CODEBOOKS},
}

# Layers that a model defines for itself and calls by name: they stay as they are inside any cache.
MODEL_DEFINED_LAYERS = {
    "DeepseekV4CSACache": "holds the compressed keys and the state of their compressor",
    "DeepseekV4HCACache": "holds the compressed keys and the state of their compressor",
    "MiniMaxM3VLSparseCacheLayer": "holds the keys of its block index",
    "UnlimitedOcrDynamicReferenceSlidingWindowLayer": "keeps the prompt and slides over the answer",
}

# Architectures without keys and values: a state is all they remember.
STATE_ONLY = ("falcon_mamba", "mamba", "mamba2")
