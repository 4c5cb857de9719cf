"""What the configs of model types need whose parts have defaults that do not fit together, or are not small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_CODEC = {"codec_config.upsample_groups": 32, "codec_config.codebook_dim": 256}
_THINKS = {"thinker_config.text_config.rope_parameters": MROPE, "thinker_config.vision_start_token_id": 90}
_LAYERED_ROPE = {"full_attention": MROPE}
_TIMM_PE = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384"}
_TIMM_PE_POOLED = {**_TIMM_PE, "num_labels": 64, "model_args": {"depth": 2, "img_size": 224}}
_TIMM_STAGES = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m1",
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    "num_classes": 2,
}
_TIMM_BACKBONE = {"backbone_config.backbone": "test_resnet"}
_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{way}_{length}ratio": [[3, 3], [1, 1], [1, 1]]
        for way in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
        for length in ("long", "mid", "short")
    },
}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_ON_LCNET = {  # each stage half as wide and high as the one before, as the necks of detectors take them
    "backbone_config.out_features": _STAGES,
    "backbone_config.block_configs": [
        [[3, 16, 16, 1, True]],
        [[3, 16, 32, 2, False]],
        [[3, 32, 32, 2, True]],
        [[3, 32, 64, 2, False]],
    ],
    "backbone_config.stem_channels": [3, 16, 16],
}
_UPSAMPLES = {"scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]}
_FEW_FILTERS = {"num_filters": 2}
_HIERA = {
    "hidden_size": 8,
    "embed_dim_per_stage": [8, 16, 32, 64],
    "image_size": [64, 64],
    "blocks_per_stage": [1, 2, 2, 1],
}
_HIERA |= {"global_attention_blocks": [2]}
_SAM2_VISION = {
    **{f"backbone_config.{name}": value for name, value in _HIERA.items()},
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
PARTS: Mapping[str, Mapping[str, Any]] = {
    "apertus1p5": {
        "text_config.vocab_size": 96,
        "vision_config.codebook_size": 16,
        "vision_config.base_channels": 32,
        "audio_config.codebook_size": 16,
        "image_token_offset": 48,
        "audio_token_offset": 64,
        "image_token_id": 46,
        "audio_token_id": 47,
    },
    "cohere_compass": {"text_config.rope_parameters": _LAYERED_ROPE, "text_config.head_dim": 8},
    "cohere_compass_text": {"rope_parameters": _LAYERED_ROPE, "head_dim": 8},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "gemma3n": {
        "text_config.num_kv_shared_layers": 0,
        "vision_config.architecture": "test_resnet",  # in place of one with 300 million parameters
        "vision_config.hidden_size": 96,
        "vision_soft_tokens_per_image": 49,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "hy_v4_vl": {"text_config.rope_parameters": MROPE},
    "hy_v4_vl_text": {"rope_parameters": MROPE},
    "molmo2": {
        "adapter_config.vision_feature_layer": [1, 0],
        "adapter_config.text_hidden_size": 256,
        "vision_config.image_size": [56, 56],
        "vision_config.num_position_embeddings": 16,
    },
    "muse_glimmer_assistant": {"layer_types": ["full_attention", "full_attention"]},  # the other needs a cache
    "muse_spark": {"audio_config.num_hidden_layers": 4},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "kyutai_speech_to_text": _CODEC,
    "csm": _CODEC,
    "pocket_tts_audio_tokenizer": {"upsample_groups": 32},
    "pocket_tts_audio_tokenizer_encoder": {"upsample_groups": 32},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 32},
    "depth_pro": {
        "intermediate_hook_ids": [1, 0],
        "patch_size": 32,
        "scaled_images_feature_dims": [32, 32, 16],
        "intermediate_feature_dims": [8, 8],
    },
    "dab-detr": {"query_dim": 4, **_TIMM_BACKBONE},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "seggpt": {"merge_index": 0},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "num_queries": 8,
        "group_detr": 2,
        "backbone_config.out_features": ["stage1", "stage2"],
        "backbone_config.window_block_indices": [0],
    },
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": _SAM2_VISION,
    "sam2": {f"vision_config.{name}": value for name, value in _SAM2_VISION.items()},
    "gemma4_audio": {"subsampling_conv_channels": [128, 32]},
    "gemma4_assistant": {
        "": {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            }
        }
    },
    "perception_lm": {
        "vision_config": {
            **_TIMM_PE,
            "model_args": {
                "embed_dim": 192,
                "depth": 2,
                "img_size": 224,
                "global_pool": "",
                "use_post_transformer_norm": False,
            },
        }
    },
    "pe_video_encoder": {"vision_config": _TIMM_PE_POOLED},
    "pe_video": {"video_config.vision_config": _TIMM_PE_POOLED},
    "pe_audio_video_encoder": {"video_config.vision_config": _TIMM_PE_POOLED},
    "pe_audio_video": {"audio_video_config.video_config.vision_config": _TIMM_PE_POOLED},
    "fast_vlm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci0",
            "model_args": {"inference_mode": True},
            "hidden_size": 1024,
        }
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "num_hidden_layers": 2,
        "vocab_size": 260,
        "encoder_config.hidden_size_global": 128,
        "decoder_config.hidden_size_global": 128,
        **{f"{part}_config.vocab_size": 260 for part in ("patcher", "encoder", "decoder")},
    },
    "vibevoice_acoustic_tokenizer": _FEW_FILTERS,
    "vibevoice_acoustic_tokenizer_encoder": _FEW_FILTERS,
    "vibevoice_acoustic_tokenizer_decoder": _FEW_FILTERS,
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config.{name}": value
        for kind in ("acoustic", "semantic")
        for name, value in _FEW_FILTERS.items()
    },
    "vibevoice": {
        f"{part}.{name}": value
        for part in ("audio_config", "semantic_model_config")
        for name, value in _FEW_FILTERS.items()
    },
    "fastspeech2_conformer_with_hifigan": {"vocoder_config.model_in_dim": 80, "model_config.vocab_size": 96},
    "glm_image": {"text_config.rope_parameters": MROPE, "vq_config.num_embeddings": 48},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "lightglue": {"keypoint_detector_config.keypoint_decoder_dim": 65},
    "efficientloftr": {
        "hidden_size": 32,
        "out_features": [8, 8, 16, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "edgetam_vision_model": {"backbone_config": _TIMM_STAGES, "backbone_channel_list": [384, 192, 96, 48]},
    "edgetam": {
        "vision_config.backbone_config": _TIMM_STAGES,
        "vision_config.backbone_channel_list": [384, 192, 96, 48],
        "vision_config.backbone_feature_sizes": [[56, 56], [28, 28], [14, 14]],
        "prompt_encoder_config.image_size": 224,
    },
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0, "mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "pp_ocrv6_small_det": {**_ON_LCNET, "layer_list_out_channels": [16, 32, 32, 64], "neck_out_channels": 64},
    "pp_ocrv6_medium_det": {**_ON_LCNET, "intraclass_block_config": _INTRACLASS, **_UPSAMPLES},
    "qwen2_5_omni": {
        "token2wav_config.bigvgan_config.upsample_initial_channel": 64,
        **_THINKS,
        "thinker_config.vision_config.window_size": 56,
    },
    "qwen3_omni_moe": {
        **_THINKS,
        "talker_config.text_config.shared_expert_intermediate_size": 32,
        "talker_config.spatial_merge_size": 2,
    },
    "dots3_note": {
        "text_config.layer_types": ["indexed_attention", "sliding_attention"],
        "text_config.per_layer_config": {1: {"kv_lora_rank": 64, "qk_nope_head_dim": 12}},
        "text_config.qk_nope_head_dim": 8,
        "audio_config.adapter_input_size": 80,
        "audio_config.adapter_out_dim": 320,
        "audio_config.conv_output_size": 480,
        "vision_config.adapter_in_dim": 96,
        "vision_config.adapter_out_dim": 320,
        "vision_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.per_layer_config": {1: {"num_local_experts": 2}},
    },
    **dict.fromkeys(("conditional_detr", "deformable_detr", "detr", "table-transformer"), _TIMM_BACKBONE),
    "omdet-turbo": {
        **_TIMM_BACKBONE,
        "backbone_config.out_indices": [2, 3, 4],
        "encoder_in_channels": [48, 192, 96],
        "apply_layernorm_after_vision_backbone": False,
        "num_queries": 8,
        "image_size": 128,
    },
    "timm_backbone": {"backbone": "test_resnet"},
}
"""Fields of configs by model type, as `CHANGES`."""
