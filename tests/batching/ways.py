"""How each architecture of transformers is batched; those that are not named here are packed."""

PADDED = """
    axk1 bailing_hybrid bamba bert bert-generation big_bird bloom camembert codegen data2vec-text deepseek_v2
    deepseek_v3 diffllama doge electra ernie falcon falcon_h1 falcon_mamba glm4_moe_lite gpt_neo
    gpt_neox_japanese gptj granitemoehybrid inkling2_text inkling_text jamba jetmoe kimi_linear lfm2 lfm2_moe
    lfm3 longcat_flash mamba mamba2 megatron-bert minicpm3 mpt nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe
    qwen3_5_moe_text qwen3_5_text qwen3_next rembert roberta roberta-prelayernorm roc_bert xglm xlm-roberta
    xlm-roberta-xl xmod youtu zamba zamba2 zaya itt:blip itt:inkling2 itt:inkling_mm_model itt:kimi_k25
    itt:lfm2_vl itt:lfm3_vl itt:minicpm_ocr itt:minicpmv4_6 itt:minicpmv4_7 itt:mistral4 itt:nemotron_h_omni
    itt:paligemma itt:qwen3_5 itt:qwen3_5_moe itt:qwen3_omni_moe_thinker s2s:nemo_speechlm
"""
"""They write their attention out, keep states, or make keys and values from latents."""

SINGLE = """
    axk2 bart bigbird_pegasus blenderbot blenderbot-small deepseek_v32 deepseek_v4 dots3_note dots3_note_text
    git glm_moe_dsa hy_v4 marian mbart minimax_m3_vl_text moshi mvp pegasus plbart prophetnet roformer trocr
    whisper itt:dots3_note itt:glm5_next itt:kosmos-2 itt:kosmos-2.5 itt:minimax_m3_vl itt:mistral_large4
    itt:unlimited_ocr
"""
"""What they store or compute depends on padding."""

DEPENDS = """
    gemma2 vaultgemma gemma4 gemma4_text gemma4_unified gemma4_unified_text mllama itt:mllama qwen4_exp qwen4_exp_text
    itt:qwen4_exp itt:gemma4 itt:gemma4_unified
"""
"""Here it depends on the version of transformers."""

REFUSED = {
    "blt": "it keeps more between forwards than the cache",
    "cpmant": "out of bounds",
    "musicgen": "invalid for input of size",
    "musicgen_melody": "invalid for input of size",
    "recurrent_gemma": "cannot go back and forth between sequences",
    "itt:idefics": "pixel_values",
}
"""What is refused besides encoder-decoders, and what the error says: codebooks, pixels and memories of their own."""

WAYS = {name: way for way, names in {"padded": PADDED, "single": SINGLE}.items() for name in names.split()}
"""Those that are not packed, and how they run."""
