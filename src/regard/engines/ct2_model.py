"""Our weights as a CTranslate2 model: no detour over another toolkit's files.

The format knows Transformers alone. It carries both norms, all activations, grouped queries, tied and untied tables,
encoder and decoder of unlike depth and width, and every kind of positions but ALiBi in an encoder. Sinusoidal and
learned positions, and none, are written as a table, so that there is a longest sequence (`positions_of`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.config import Config
from regard.config_model import AnyModelConfig, TransformerSideConfig
from regard.errors import MissingExtra
from regard.model.seq2seq import Seq2Seq
from regard.model.transformer import TransformerDecoder, TransformerEncoder
from regard.text.tokenizer import BOS, EOS, SPECIALS, UNK, Tokenizer, Tokenizers

POSITIONS = 4096
"""Places in a table of positions, where neither the model nor its [decode] asks for another number."""
EPSILON = 1e-5
"""Of our norms of both kinds."""
TYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"}
"""Weights as they are stored, by precision."""


def ctranslate2() -> Any:
    """The package; raises MissingExtra where it is not installed."""
    try:
        import ctranslate2
        import ctranslate2.specs
    except ImportError:
        raise MissingExtra("ctranslate2", "ctranslate2", "the engine ctranslate2") from None
    return ctranslate2


def precisions() -> list[str]:
    """Those that CTranslate2 has for this processor."""
    supported = ctranslate2().get_supported_compute_types("cpu")
    return [precision for precision in TYPES if precision in supported]


def refusals(config: AnyModelConfig) -> Iterator[str]:
    """Why CTranslate2 cannot carry a model, each with its setting; nothing if it can."""
    whole = {getattr(config, "kind", None)}
    for name, side in (("encoder", config.encoder), ("decoder", config.decoder)):
        place = "" if side.kind in whole else f"{name}."
        if side.kind != "transformer" and (place or name == "encoder"):
            yield f'{place}kind = "{side.kind}": the format knows Transformers alone'
        elif name == "encoder" and getattr(side, "positions", None) == "alibi":
            yield f'{place}positions = "alibi": the format has them in a decoder, not in an encoder'
    if config.reverse_source:
        yield "reverse_source = true: a source that begins with </s> and has one more token is empty to CTranslate2"


def positions_of(config: Config) -> int | None:
    """The longest sequence, </s> included, that a converted model reads or writes; None: any.

    A model with learned positions has its own limit, which [decode] keeps to.
    """
    tables = {side.positions for side in (config.model.encoder, config.model.decoder)
              if isinstance(side, TransformerSideConfig)}
    return max(POSITIONS, config.decode.max_source_tokens + 1, config.decode.max_length + 1) if (
        tables & {"sinusoidal", "none"}) else None


def names_of(tokenizer: Tokenizer) -> list[str]:
    """The vocabulary as CTranslate2 is told it: the entries, a space before those that look like a special token."""
    others = tokenizer.vocabulary.entries[len(SPECIALS):]
    return SPECIALS + [f" {entry}" if entry in SPECIALS else entry for entry in others]


def save(model: Seq2Seq, tokenizers: Tokenizers, config: Config, precision: str, folder: Path) -> None:
    """Write a model as CTranslate2 reads it: model.bin, config.json and the vocabulary.

    Args:
        model: a Transformer that `refusals` has nothing against; it stays as it is.
        tokenizers: of source and target.
        config: the run's.
        precision: "float32", "bfloat16" or "int8".
        folder: exists already.
    """
    specs = ctranslate2().specs
    assert isinstance(model.encoder, TransformerEncoder) and isinstance(model.decoder, TransformerDecoder)
    encoder = specs.TransformerEncoderSpec(**_shape(specs, config.model.encoder))
    decoder = specs.TransformerDecoderSpec(**_shape(specs, config.model.decoder), **_alibi(config.model.decoder))
    longest = positions_of(config) or 0
    for spec, side, settings in ((encoder, model.encoder, config.model.encoder),
                                 (decoder, model.decoder, config.model.decoder)):
        assert isinstance(settings, TransformerSideConfig)
        _stack(spec, side, settings, longest)
    encoder.embeddings[0].weight = _array(model.encoder.embedding.weight)
    decoder.embeddings.weight = _array(model.decoder.embedding.weight)
    decoder.projection.weight = _array(model.output)
    whole = specs.TransformerSpec(encoder, decoder)
    whole.register_source_vocabulary(names_of(tokenizers.source))
    whole.register_target_vocabulary(names_of(tokenizers.target))
    for name, value in (("unk_token", SPECIALS[UNK]), ("bos_token", SPECIALS[BOS]), ("eos_token", SPECIALS[EOS]),
                        ("decoder_start_token", SPECIALS[BOS]), ("add_source_eos", True),
                        ("layer_norm_epsilon", EPSILON)):
        setattr(whole.config, name, value)
    whole.validate()
    whole.optimize(quantization=TYPES[precision])
    whole.save(str(folder))


def _shape(specs: Any, config: Any) -> dict[str, Any]:
    """What the specification of a side is made from."""
    activations = specs.common_spec.Activation
    shape = {
        "num_layers": config.layers, "num_heads": config.heads, "pre_norm": config.norm == "pre",
        "activation": {"relu": activations.RELU, "gelu": activations.GELU, "swiglu": activations.SWISH}[
            config.activation],
        "ffn_glu": config.activation == "swiglu", "rms_norm": config.norm_kind == "rms",
        "num_heads_kv": None if config.kv_heads == config.heads else config.kv_heads,
        "relative_attention_bias": config.positions == "relative"}
    if config.positions == "rotary":
        shape |= {"rotary_dim": config.width // config.heads, "rotary_interleave": False}
    return shape


def _alibi(config: Any) -> dict[str, bool]:
    return {"alibi": config.positions == "alibi", "alibi_use_positive_positions": False}


def _stack(spec: Any, side: Any, config: TransformerSideConfig, longest: int) -> None:
    """Put the weights of an encoder or a decoder, but for its embedding, into their specification."""
    if config.norm == "pre":
        _norm(spec.layer_norm, side.norm)
    if config.positions in TABLES:
        spec.position_encodings.encodings = TABLES[config.positions](side, longest)
    for layer_spec, layer in zip(spec.layer, side.layers, strict=True):
        _self_attention(layer_spec.self_attention, layer)
        if config.positions == "relative":
            layer_spec.self_attention.relative_attention_bias = _array(side.positions.table)
            layer_spec.self_attention.relative_attention_max_distance = np.int32(side.positions.greatest)
        if isinstance(side, TransformerDecoder):
            cross, parts = layer_spec.attention, (layer.cross.query, layer.cross.key_value, layer.cross.output)
            _norm(cross.layer_norm, layer.cross_residual.norm)
            for linear, part in zip(cross.linear, parts, strict=True):
                _linear(linear, part)
        _feed_forward(layer_spec.ffn, layer)


def _self_attention(spec: Any, layer: Any) -> None:
    _norm(spec.layer_norm, layer.attention_residual.norm)
    _linear(spec.linear[0], layer.attention.query, layer.attention.key_value)
    _linear(spec.linear[1], layer.attention.output)


def _feed_forward(spec: Any, layer: Any) -> None:
    inner = layer.feedforward.inner
    _norm(spec.layer_norm, layer.feedforward_residual.norm)
    _linear(spec.linear_1, layer.feedforward.outer)
    if not hasattr(spec, "linear_0_noact"):
        _linear(spec.linear_0, inner)
        return
    for half, part in enumerate((spec.linear_0, spec.linear_0_noact)):  # the gate, and what it lets through
        part.weight, part.bias = (_array(each.chunk(2)[half]) for each in (inner.weight, inner.bias))


def _linear(spec: Any, *parts: nn.Linear) -> None:
    """One linear map, or several side by side."""
    spec.weight = _array(torch.cat([part.weight for part in parts]))
    spec.bias = _array(torch.cat([part.bias for part in parts]))


def _norm(spec: Any, norm: nn.Module) -> None:
    spec.gamma = _array(norm.weight)
    if isinstance(norm, nn.LayerNorm):
        spec.beta = _array(norm.bias)


def _array(weights: Tensor | nn.Module) -> NDArray[np.float32]:
    """Weights as an array of their own: CTranslate2 quantizes what it is given in its place."""
    assert isinstance(weights, Tensor)
    return weights.detach().float().cpu().numpy().copy()


TABLES: dict[str, Callable[[Any, int], NDArray[np.float32]]] = {
    "sinusoidal": lambda side, longest: _array(side.positions.waves(0, longest, torch.empty(0))),
    "learned": lambda side, longest: _array(side.positions.table),
    "none": lambda side, longest: np.zeros((longest, side.embedding.weight.shape[1]), dtype=np.float32),
}
"""Positions that are added to the token vectors, as a table; CTranslate2's own sinusoids are in another order."""
