"""What the tiny config of one model type needs besides the general sizes, by the model type of the (sub-)config.

For a sub-config the value is a dict of values, its model type among them where another is to be used, or None.
"""

from tests.architectures.sizes import WINDOW


def layers(*kinds, **values):
    """A config with these layers, in this order."""
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds)} | values


def rope(**values):
    """Plain rotary embedding, with `values` besides."""
    return {"rope_type": "default", "rope_theta": 10000.0} | values


FULL, SLIDING, LINEAR, CONV = "full_attention", "sliding_attention", "linear_attention", "conv"
MLA = {"num_key_value_heads": 4}
MROPE = {"rope_parameters": rope(mrope_section=[2, 1, 1])}
SPARSE_BLOCKS = {"index_block_size": 4, "index_topk_blocks": 2}

LATENT_ATTENTION = dict.fromkeys(
    (
        "axk1",
        "axk2",
        "bailing_hybrid",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "kimi_linear",
        "minicpm3",
        "mistral4",
        "youtu",
    ),
    MLA,
)

MULTIMODAL_ROPE = dict.fromkeys(
    (
        "cosmos3_edge_text",
        "glm4v_text",
        "glm46v_text",
        "glm_ocr_text",
        "paddleocr_vl_text",
        "qwen2_5_omni_text",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3_omni_moe_text",
    ),
    MROPE,
)

HYBRID = {
    "bailing_hybrid": MLA | layers(LINEAR, FULL, LINEAR, FULL),
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": layers(LINEAR, FULL, LINEAR),
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_conv": 4},
    "kimi_linear": MLA | layers(LINEAR, FULL, LINEAR),
    "lfm2": layers(CONV, FULL, CONV),
    "lfm2_moe": layers(CONV, FULL, CONV),
    "lfm3": layers(CONV, FULL, SLIDING, CONV),
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mamba"]},
    "qwen4_exp_text": {
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": WINDOW},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": [LINEAR, LINEAR, "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"]},
    "zaya": layers("hybrid", "hybrid_sliding", "hybrid", num_experts_per_tok=1, router_hidden_size=16),
}

WINDOWS = {
    "cohere_compass_text": layers(
        SLIDING, FULL, SLIDING, FULL, rope_parameters={SLIDING: rope(mrope_section=[2, 1, 1]), FULL: None}
    ),
    "deepseek_v4": layers(
        SLIDING,
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        num_key_value_heads=1,
        head_dim=16,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        partial_rotary_factor=0.5,
        o_groups=2,
        o_lora_rank=16,
    ),
    "dots3_note_text": MLA
    | {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "head_dim": 16,
        "shared_experts_intermediate_size": 16,
    },
    "gemma3n_text": layers(
        SLIDING,
        FULL,
        SLIDING,
        FULL,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
    ),
    "gemma4_text": layers(
        SLIDING,
        FULL,
        SLIDING,
        FULL,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        global_head_dim=16,
    ),
    "gemma4_unified_text": layers(SLIDING, FULL, SLIDING, FULL, num_kv_shared_layers=2, global_head_dim=16),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "laguna": layers(FULL, SLIDING, FULL, num_attention_heads_per_layer=[4, 2, 4]),
    "minimax_m3_vl_text": layers(FULL, "minimax_m3_sparse", "minimax_m3_sparse", dense_intermediate_size=32)
    | SPARSE_BLOCKS,
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "smollm3": layers(FULL, SLIDING, FULL, no_rope_layers=[1, 0, 1]),
    "step3p5": layers(FULL, SLIDING, FULL, SLIDING, num_sliding_attention_heads=2, share_expert_dim=16),
}

BERT_DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}

OTHERS = {
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": BERT_DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": BERT_DECODER},
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "DbrxFFNConfig": {"moe_top_k": 2},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "num_hidden_layers": 2,
        "patch_in_forward": False,
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 64,
    },
    "cpmant": {
        "dim_head": 8,
        "prompt_length": 4,
        "position_bias_num_buckets": 16,
        "position_bias_max_distance": 64,
        "dim_ff": 32,
    },
    "fsmt": {"src_vocab_size": 128, "tgt_vocab_size": 128},
    "kosmos_2_5_text_model": {"layers": 2},
    "kosmos_2_text_model": {"layers": 2},
    "led": {
        "max_encoder_position_embeddings": 256,
        "max_decoder_position_embeddings": 256,
        "attention_window": [8, 8, 8],
    },
    "longcat_flash": MLA | {"expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}

SIGLIP = {"model_type": "siglip_vision_model"}
INKLING = {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 8}

PERCEPTION = {
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere2_vision": {"alignment_intermediate_size": 32},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "ernie4_5_vl_moe_text": {"rope_parameters": rope(mrope_section=[1, 1, 2]), "moe_intermediate_size": [16, 16]},
    "fast_vlm": {"vision_config": SIGLIP},
    "florence_vision": {
        "embed_dim": [8, 8, 8, 32],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "depths": [1, 1, 1, 1],
        "patch_size": [7, 3, 3, 3],
        "projection_dim": 32,
    },
    "glm4v_moe_text": {"rope_parameters": rope(mrope_section=[2, 1, 1], partial_rotary_factor=1.0)},
    "glm5_next_text": MLA | {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4},
    "hunyuan_vl_text": {"rope_parameters": rope(xdrope_section=[1, 1, 1, 1])},
    "mistral_large4_text": MLA
    | {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 1],
        "kv_source_layers": [0, 1, 0, 3],
        "indexer_types": ["full", "full", "shared", "full"],
    },
    "granite4_vision": {
        "text_config": {"model_type": "granite4_vision_text"},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64},
        "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64, "num_attention_heads": 1},
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1],
    },
    "granite_speech_encoder": {"hidden_dim": 32, "dim_head": 8, "context_size": 8},
    "granite_speech_plus_encoder": {"hidden_dim": 32, "dim_head": 8, "context_size": 8},
    "inkling_text": INKLING,
    "inkling2_text": INKLING,
    "inkling_vision": {"num_hidden_layers": 8},
    "molmo2_adapter": {"vision_feature_layer": [-1]},
    "molmo2_vision": {"image_size": [16, 16], "num_key_value_heads": 4},
    "muse_spark_text": {"moe_hidden_size": 32},
    "muse_spark_audio": {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [32], "depths": [1]},
    "nemotron_h_omni": {"audio_config": None, "vision_config": {"video_temporal_patch_size": 2}},
    "Nemotron3DiarizationHeadConfig": {"audio_hidden_size": 32},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 127},
    "perception_lm": {"vision_config": SIGLIP | {"model_args": {"embed_dim": 32}}},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "PPFormulaNetVisionConfig": {
        "output_channels": 32,
        "post_conv_in_channels": 32,
        "post_conv_mid_channels": 32,
        "post_conv_out_channels": 32,
        "decoder_hidden_size": 32,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 3},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 3},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
}

OVERRIDES: dict[str, dict] = LATENT_ATTENTION | MULTIMODAL_ROPE | HYBRID | WINDOWS | OTHERS | PERCEPTION

# A vision tower that needs no other library, where the config class takes no other by itself.
STAND_INS = {
    "gemma3n": {
        "vision_config": SIGLIP | {"vocab_size": 128, "vocab_offset": 128, "rms_norm_eps": 1e-6, "do_pooling": False}
    },
}

# Where text alone does not get through the whole model.
SUBMODELS = {
    "itt:blip": "text_decoder",
    "itt:blip-2": "language_model",
    "itt:instructblip": "language_model",
    "itt:instructblipvideo": "language_model",
    "itt:kosmos-2": "text_model",
}

# Configs that, in transformers 5.17, take their sub-configs as dicts only.
TAKE_DICTS = ("encoder-decoder", "vision-encoder-decoder")

# With the usual seed, these models do not notice a wrong token in their cache.
SEEDS = dict.fromkeys(("itt:lfm2_vl", "itt:pp_formulanet", "s2s:plbart"), 1)
SEEDS |= dict.fromkeys(("recurrent_gemma", "zamba"), 4)
