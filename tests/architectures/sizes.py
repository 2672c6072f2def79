"""Tiny values for the fields of transformers' configs, by field name.

A field is set wherever a config class has one of that name, so the values must fit together:
hidden 32 = 4 heads of 8, 2 key/value heads, latent attention of rank 16 with rotary and plain parts of 8.
"""

VOCAB_SIZE = 128
WINDOW = 8
PAD, BOS, EOS = 0, 1, 2

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "sep_token_id": EOS,
    "decoder_start_token_id": BOS,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_source_positions": 256,
    "max_target_positions": 256,
    "type_vocab_size": 2,
    "max_seq_len": 256,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
}

HIDDEN = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "intermediate_size": 32,
    "d_ff": 32,
    "ffn_dim": 32,
    "mlp_dim": 32,
    "ffn_hidden_size": 32,
    "dff": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "projection_dim": 32,
    "output_dim": 32,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "projector_hidden_size": 32,
    "encoder_hidden_size": 32,
    "downsample_hidden_size": 8,
    "output_channels": 8,
    "vision_output_dim": 32,
    "adapter_out_dim": 32,
    "shared_intermediate_size": 32,
    "hidden_size_global": 32,
}

LAYERS = {
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "depth": 2,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "max_window_layers": 1,
}

ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_kv": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 8,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "use_sliding_window": True,
    "query_pre_attn_scalar": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
}

EXPERTS = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}

STATES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 8,
}

PERCEPTION = {
    "image_size": 16,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "num_mel_bins": 16,
    "vision_feature_layer": -1,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "mm_tokens_per_image": 4,
    "image_seq_length": 4,
    "num_query_tokens": 4,
    "resampler_depth": 1,
    "resampler_n_latents": 4,
    "resampler_n_heads": 4,
    "resampler_head_dim": 8,
    "latent_query_num": 4,
    "base_channels": 32,
    "num_res_blocks": 1,
    "latent_channels": 8,
    "num_embeddings": 16,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}

SIZES = TEXT | HIDDEN | LAYERS | ATTENTION | EXPERTS | STATES | PERCEPTION
