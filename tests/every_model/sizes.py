"""How small the models are: fields by their usual names, and what single types need besides.

A field is given to a configuration (or to one inside it) only where that has a field of the name.
"""

VOCAB = 128
WINDOW = 12

SIZES = {
    "vocab_size": VOCAB,
    "type_vocab_size": 2,
    # Width. head_dim is not hidden_size / num_attention_heads: neither can pass for the other.
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embedding_size": 64,
    "head_dim": 24,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    # Depth. Encoders as deep as decoders: transformers sizes some caches by the encoder.
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    # Heads.
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    # Multi-head latent attention.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # Windows and lengths.
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_sequence_length": 512,
    "max_seq_len": 512,
    "max_target_positions": 512,
    "max_source_positions": 64,
    "rotary_dim": 8,
    # Embeddings that every layer has of its own.
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    # Vision and sound, which no prompt here has.
    "image_size": 32,
    "patch_size": 16,
    "adapter_in_dim": 64,
    "adapter_out_dim": 64,
    "adapter_input_size": 64,
    # State of recurrent layers.
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "state_size": 8,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # Sparse indexes.
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 16,
    # A decoder that stands alone.
    "is_decoder": True,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}

# Fields of single types, instead of those above or besides them; those of a configuration inside
# another by a dictionary.
_SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_WINDOW_FIRST = {"layer_types": ["sliding_attention", "full_attention"]}

_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_embed_dim": 16,
}

SPECIAL: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "patcher_config": {"head_dim": 16}},
    "cohere_compass_text": {
        **_WINDOW_FIRST,
        "rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"shared_experts_intermediate_size": 32},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n": {"text_config": _SHARING | {"laurel_rank": 8}},
    "gemma3n_text": _SHARING
    | {"laurel_rank": 8, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "helium": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"head_dim": 32, "n_groups": 2},
    "moshi": {"audio_vocab_size": 64},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": WINDOW},
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 48]},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 16,
        "shape_vocab_size": VOCAB,
    },
    "xlm": {"emb_dim": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}
