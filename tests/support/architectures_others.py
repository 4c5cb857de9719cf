"""Small encoders, encoder-decoders and models of images and sound, with tables of their roles; see `architectures.py`.

What makes the residual stream, a projection of embeddings, writes it: it is what the first block adds to.
"""

from __future__ import annotations

from tests.support.architectures import ATTENTION, FC, LAYER, OUT_PROJ, SELF_OUT, SMALL, Architecture, under

_TOKENS = {**SMALL, "type_vocab_size": 2}

# BERT and its descendants.
_BERT_LAYER = """
attention.self.query query reader
attention.self.key key reader
attention.self.value value reader
attention.output.dense output writer
intermediate.dense up reader
output.dense down writer
"""
# The transform before the decoder has an activation, but writes no stream.
_MASKED_HEAD = """
cls.predictions.transform.dense reader
cls.predictions.decoder head inner
"""
_CLASSIFIER = """
classifier.dense reader
classifier.out_proj head inner
"""
_DISTILBERT = """
distilbert.transformer.layer.0.attention.q_lin query reader
distilbert.transformer.layer.0.attention.k_lin key reader
distilbert.transformer.layer.0.attention.v_lin value reader
distilbert.transformer.layer.0.attention.out_lin output writer
distilbert.transformer.layer.0.ffn.lin1 up reader
distilbert.transformer.layer.0.ffn.lin2 down writer
pre_classifier reader
classifier head inner
"""
# One layer, called twice.
_ALBERT = """
albert.encoder.embedding_hidden_mapping_in writer
albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query query reader
albert.encoder.albert_layer_groups.0.albert_layers.0.attention.key key reader
albert.encoder.albert_layer_groups.0.albert_layers.0.attention.value value reader
albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense output writer
albert.encoder.albert_layer_groups.0.albert_layers.0.ffn up reader
albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output down writer
predictions.dense reader
predictions.decoder head inner
"""
_DEBERTA_V2 = _BERT_LAYER.replace("query q", "query_proj q").replace("key k", "key_proj k")
_DEBERTA_V2 = _DEBERTA_V2.replace("value v", "value_proj v")
# Relative positions are projected apart; their scores are gathered before they are added, so that the dataflow shows
# them as a bias of the attention.
_DEBERTA = """
attention.self.in_proj query key value reader
attention.self.pos_proj inner
attention.self.pos_q_proj inner
attention.output.dense output writer
intermediate.dense up reader
output.dense down writer
"""
_DEBERTA_CONFIG = {**_TOKENS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_MODERNBERT_LAYER = """
attn.Wqkv query key value reader
attn.Wo output writer
mlp.Wi gate up reader
mlp.Wo down writer
"""
# A layer narrows the stream (`bottleneck.input`), works on a stream of its own, and adds that to the wide one
# (`output.bottleneck`). Queries and keys are projected from a narrowing that they share, values from the wide stream.
_MOBILEBERT = """
mobilebert.embeddings.embedding_transformation writer
mobilebert.encoder.layer.0.bottleneck.input.dense reader writer
mobilebert.encoder.layer.0.bottleneck.attention.dense query key reader
mobilebert.encoder.layer.0.attention.self.query query inner
mobilebert.encoder.layer.0.attention.self.key key inner
mobilebert.encoder.layer.0.attention.self.value value reader
mobilebert.encoder.layer.0.attention.output.dense output writer
mobilebert.encoder.layer.0.ffn.0.intermediate.dense up reader
mobilebert.encoder.layer.0.ffn.0.output.dense down writer
mobilebert.encoder.layer.0.intermediate.dense up reader
mobilebert.encoder.layer.0.output.dense down writer
mobilebert.encoder.layer.0.output.bottleneck.dense reader writer
cls.predictions.transform.dense reader
cls.predictions.dense head inner
"""
_JOINED = "its weight is joined with the larger one of `dense` before the product: one site, of that name"
# Relative attention: the scores are sums of products, with keys, positions and segments.
_FUNNEL_LAYER = """
attention.q_head query reader
attention.k_head key reader
attention.v_head value reader
attention.sites.r_kernel inner
attention.post_proj output writer
ffn.linear_1 up reader
ffn.linear_2 down writer
"""
_FUNNEL = under("funnel.encoder.blocks.0.0", _FUNNEL_LAYER) + under("funnel.encoder.blocks.1.0", _FUNNEL_LAYER)

# The fifth parameter projects positions.
_XLNET_ATTENTION = """
q query reader
k key reader
v value reader
r inner
o output writer
"""

# Encoder-decoders.
_T5_ATTENTION = """
q query reader
k key reader
v value reader
o output writer
"""
_T5_MLP = """
DenseReluDense.wi up reader
DenseReluDense.wo down writer
"""
_T5_GATED = """
DenseReluDense.wi_0 gate reader
DenseReluDense.wi_1 up reader
DenseReluDense.wo down writer
"""
_T5_CONFIG = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_SEQ2SEQ_CONFIG = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_SEQ2SEQ = under("model.encoder.layers.0", SELF_OUT, FC) + under(
    "model.decoder.layers.0", SELF_OUT, under("encoder_attn", OUT_PROJ), FC
)


def _t5(feed_forward: str) -> str:
    attention = under("layer.0.SelfAttention", _T5_ATTENTION)
    cross = under("layer.1.EncDecAttention", _T5_ATTENTION)
    encoder = under("encoder.block.0", attention, under("layer.1", feed_forward))
    decoder = under("decoder.block.0", attention, cross, under("layer.2", feed_forward))
    return encoder + decoder + "lm_head head reader"


# Images.
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_VIT_LAYER = under("attention", ATTENTION) + under("mlp", FC)
_SWIN_CONFIG = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
# Between the stages, patches are merged: the result is the stream of the next stage.
_SWIN = (
    under("swin.encoder.layers.0.blocks.0", _VIT_LAYER)
    + "swin.encoder.layers.0.downsample.reduction reader writer\n"
    + under("swin.encoder.layers.1.blocks.0", _VIT_LAYER)
    + "classifier head reader"
)
# A block convolves the stream first: its linears are a feed-forward block that reads the convolution, not the stream.
_CONVNEXT_LAYER = """
pwconv1 up inner
pwconv2 down writer
"""
# In the first stage, keys and values are projected from a convolution that shortens the sequence. The feed-forward
# block convolves along the image between its linears, which leaves them without a fine role: so does Mamba.
_MIXED = """
mlp.fc1 reader
mlp.fc2 writer
"""
_SEGFORMER = (
    under("segformer.stages.0.blocks.0", under("attention", ATTENTION), _MIXED)
    .replace("key reader", "key inner")
    .replace("value reader", "value inner")
    + under("segformer.stages.1.blocks.0", under("attention", ATTENTION), _MIXED)
    + "classifier head reader"
)
_SEGFORMER_CONFIG = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
    "image_size": 16,
    "drop_path_rate": 0.0,
}
_CLIP_LAYER = SELF_OUT + under("mlp", FC)
# Pooling by attention, from a learnt query: `nn.MultiheadAttention`. Its result is the stream of one more block.
_SIGLIP_HEAD = """
attention.in_proj.rows_0_16 query inner
attention.in_proj.rows_16_48 key value reader
attention.out_proj output writer
mlp.fc1 up reader
mlp.fc2 down writer
"""
_FUNCTIONAL = "nn.MultiheadAttention uses its weight without calling the module"

# Sound.
_SOUND = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
_WAV2VEC2 = "feature_projection.projection writer\n" + under(
    "encoder.layers.0",
    under("attention", OUT_PROJ),
    "feed_forward.intermediate_dense up reader",
    "feed_forward.output_dense down writer",
)

# A feed-forward block before and one after; the positions are projected apart, as DeBERTa's.
_CONFORMER = "wav2vec2_conformer.feature_projection.projection writer\n" + under(
    "wav2vec2_conformer.encoder.layers.0",
    under("ffn1", "intermediate_dense up reader", "output_dense down writer"),
    under(
        "self_attn",
        "linear_q query reader",
        "linear_k key reader",
        "linear_v value reader",
        "linear_pos inner",
        "linear_out output writer",
    ),
    under("ffn2", "intermediate_dense up reader", "output_dense down writer"),
)

# Text with images: the projector's result replaces embeddings, which adds to no stream.
_LLAVA = (
    under("model.vision_tower.encoder.layers.0", _CLIP_LAYER)
    + under("model.multi_modal_projector", "linear_1 reader", "linear_2 inner")
    + under("model.language_model.layers.0", LAYER)
    + "lm_head head reader"
)

OTHERS: dict[str, Architecture] = {
    "bert": Architecture("BertForMaskedLM", _TOKENS, under("bert.encoder.layer.0", _BERT_LAYER) + _MASKED_HEAD),
    "bert-classifier": Architecture(
        "BertForSequenceClassification",
        _TOKENS,
        under("bert.encoder.layer.0", _BERT_LAYER) + "bert.pooler.dense reader\nclassifier head inner",
    ),
    "roberta": Architecture(
        "RobertaForSequenceClassification",
        {**_TOKENS, "max_position_embeddings": 40},
        under("roberta.encoder.layer.0", _BERT_LAYER) + _CLASSIFIER,
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 32},
        _DISTILBERT,
    ),
    "electra": Architecture(
        "ElectraForSequenceClassification",
        {**_TOKENS, "embedding_size": 12},
        "electra.embeddings_project writer\n" + under("electra.encoder.layer.0", _BERT_LAYER) + _CLASSIFIER,
    ),
    "albert": Architecture("AlbertForMaskedLM", {**_TOKENS, "embedding_size": 12, "num_hidden_layers": 2}, _ALBERT),
    "deberta": Architecture(
        "DebertaForMaskedLM",
        {**_DEBERTA_CONFIG, "max_relative_positions": 8},
        under("deberta.encoder.layer.0", _DEBERTA) + _MASKED_HEAD,
    ),
    "deberta-v2": Architecture(
        "DebertaV2ForMaskedLM",
        {**_DEBERTA_CONFIG, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        under("deberta.encoder.layer.0", _DEBERTA_V2) + _MASKED_HEAD,
    ),
    "modernbert": Architecture(
        "ModernBertForMaskedLM",
        {
            **SMALL,
            "num_hidden_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
        },
        under("model.layers.0", _MODERNBERT_LAYER)
        + under("model.layers.1", _MODERNBERT_LAYER)
        + "head.dense reader\ndecoder head inner",
    ),
    "mobilebert": Architecture(
        "MobileBertForMaskedLM",
        {**_TOKENS, "embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
        _MOBILEBERT,
        no_site={"cls.predictions.decoder": _JOINED},
    ),
    "funnel": Architecture(
        "FunnelForMaskedLM",
        {
            "vocab_size": 40,
            "d_model": 16,
            "n_head": 4,
            "d_head": 4,
            "d_inner": 24,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
        _FUNNEL + under("funnel.decoder.layers.0", _FUNNEL_LAYER) + "lm_head head reader",
        fixed_length="it pools the tokens to lists of positions that depend on their number",
    ),
    "xlnet": Architecture(  # its attention multiplies by three-dimensional parameters, not by modules
        "XLNetLMHeadModel",
        {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 4, "d_inner": 24},
        under("transformer.layer.0.rel_attn.sites", _XLNET_ATTENTION)
        + under("transformer.layer.0.ff", "layer_1 up reader", "layer_2 down writer")
        + "lm_loss head reader",
        unwrapped={f"transformer.layer.0.rel_attn.sites.{name}": "it is a parameter" for name in "qkvo"},
    ),
    "t5": Architecture("T5ForConditionalGeneration", _T5_CONFIG, _t5(_T5_MLP)),
    "t5-gated": Architecture(
        "T5ForConditionalGeneration", {**_T5_CONFIG, "feed_forward_proj": "gated-gelu"}, _t5(_T5_GATED)
    ),
    "bart": Architecture("BartForConditionalGeneration", _SEQ2SEQ_CONFIG, _SEQ2SEQ + "lm_head head reader"),
    "marian": Architecture("MarianMTModel", _SEQ2SEQ_CONFIG, _SEQ2SEQ + "lm_head head reader"),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ_CONFIG, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32},
        _SEQ2SEQ + "proj_out head reader",
    ),
    "vit": Architecture(
        "ViTForImageClassification", _IMAGES, under("vit.layers.0", _VIT_LAYER) + "classifier head reader"
    ),
    "deit": Architecture(
        "DeiTForImageClassification", _IMAGES, under("deit.layers.0", _VIT_LAYER) + "classifier head reader"
    ),
    "dinov2": Architecture(
        "Dinov2ForImageClassification",
        {**_IMAGES, "mlp_ratio": 2},
        under("dinov2.encoder.layer.0", _VIT_LAYER) + "classifier head reader",
    ),
    "beit": Architecture(
        "BeitForImageClassification", _IMAGES, under("beit.layers.0", _VIT_LAYER) + "classifier head reader"
    ),
    "swin": Architecture("SwinForImageClassification", _SWIN_CONFIG, _SWIN),
    "segformer": Architecture("SegformerForImageClassification", _SEGFORMER_CONFIG, _SEGFORMER),
    "convnext": Architecture(
        "ConvNextForImageClassification",
        {"image_size": 16, "patch_size": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        under("convnext.encoder.stages.0.layers.0", _CONVNEXT_LAYER)
        + under("convnext.encoder.stages.1.layers.0", _CONVNEXT_LAYER)
        + "classifier head reader",
    ),
    "siglip": Architecture(
        "SiglipModel",
        {"text_config": {**SMALL, "projection_size": 16}, "vision_config": _IMAGES},
        under("vision_model.encoder.layers.0", _CLIP_LAYER)
        + under("vision_model.head", _SIGLIP_HEAD)
        + under("text_model.encoder.layers.0", _CLIP_LAYER)
        + "text_model.head head reader",
        unwrapped={
            "vision_model.head.attention.in_proj.rows_0_16": _FUNCTIONAL,
            "vision_model.head.attention.in_proj.rows_16_48": _FUNCTIONAL,
            "vision_model.head.attention.out_proj": _FUNCTIONAL,
        },
    ),
    "clip": Architecture(
        "CLIPModel",
        {"text_config": SMALL, "vision_config": _IMAGES, "projection_dim": 12},
        under("vision_model.encoder.layers.0", _CLIP_LAYER)
        + under("text_model.encoder.layers.0", _CLIP_LAYER)
        + "visual_projection head reader\ntext_projection head reader",
    ),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", _SOUND, under("wav2vec2", _WAV2VEC2) + "lm_head head reader"),
    "hubert": Architecture("HubertModel", _SOUND, _WAV2VEC2),
    "wav2vec2-conformer": Architecture(
        "Wav2Vec2ConformerForCTC", {**_SOUND, "conv_depthwise_kernel_size": 3}, _CONFORMER + "lm_head head reader"
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**SMALL, "num_key_value_heads": 2, "model_type": "llama"},
            "vision_config": {**_IMAGES, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 39,
        },
        _LLAVA,
        fixed_batch="the count of image tokens is compared with that of the image's parts",
    ),
}
