"""The settings of `[model]`: one class for each family, and one for an encoder and a decoder of different families.

    RNNConfig           an RNNEncoderConfig and an RNNDecoderConfig in one
    ConvConfig          a ConvSideConfig for both sides
    TransformerConfig   a TransformerSideConfig for both sides, with layers of each
    MixedConfig         [model.encoder] and [model.decoder], each with its own kind

Every one of them has `encoder` and `decoder`: the settings that each side is built from. What cannot work together is
told by `reasons`, all of it at once; `refuse` raises it.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

ScoreName = Literal["dot", "scaled_dot", "general", "concat", "additive"]
PositionsName = Literal["none", "sinusoidal", "learned", "relative", "rotary", "alibi"]


class Section(BaseModel):
    """What all sections share: they cannot be changed once read, and they know no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def changed(self, *names: str) -> Iterator[str]:
        """Those of the settings that are not at their default, as a person would write them."""
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                yield f"{name} = {written(value)}"


def written(value: Any) -> str:
    """A value as TOML writes it."""
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


class SideConfig(Section):
    """What an encoder and a decoder of every family have."""

    width: int = Field(256, ge=2, description="size of embeddings and of every hidden state")
    layers: int = Field(2, ge=1, description="layers of the encoder, and of the decoder")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of values dropped in training")

    def reasons(self) -> Iterator[str]:
        """Why these settings cannot work together; nothing if they can."""
        yield from ()

    @property
    def longest(self) -> int | None:
        """The longest sequence it can read, in tokens; None: any."""
        return None


class WholeConfig(Section):
    """What every whole model has."""

    tie: Literal["all", "decoder", "none"] = Field("decoder", description="which tables are one: all = both embeddings "
                                                   "and the output; decoder = target embedding and output")
    reverse_source: bool = Field(False, description="read the source from right to left (Sutskever et al. 2014)")

    def unread(self, decoder: SideConfig) -> Iterator[str]:
        """Why the target's embedding would never be read; nothing if it is."""
        if self.tie == "none" and getattr(decoder, "context", None) == "input_only":
            yield ('tie = "none" gives the target an embedding of its own, which context = "input_only" never reads: '
                   'use tie = "decoder", or another context')


class RNNSideConfig(SideConfig):
    """What both sides of an RNN have."""

    kind: Literal["rnn"]
    cell: Literal["elman", "gru", "lstm"] = Field("gru", description="elman | gru | lstm")
    residual: bool = Field(False, description="each layer after the first adds its input to its output")
    variational_dropout: bool = Field(False, description="drop the same values at every position of a sequence (Gal "
                                                         "and Ghahramani 2016), between the layers")

    def reasons(self) -> Iterator[str]:
        yield from super().reasons()
        if self.residual and self.layers == 1:
            yield "residual = true means nothing with layers = 1: use layers = 2 or more, or leave residual out"


class RNNEncoderConfig(RNNSideConfig):
    """A recurrent encoder, and the fixed vector it makes."""

    bidirectional: bool = Field(True, description="the encoder reads both ways, width / 2 each")
    summary: Literal["last", "mean", "max", "project"] = Field("last", description="the fixed vector: last state, mean "
                                                               "or maximum of all, or tanh(V last) (Cho 2014)")

    def reasons(self) -> Iterator[str]:
        yield from super().reasons()
        if self.bidirectional and self.width % 2:
            yield (f"bidirectional = true needs an even width, and width = {self.width}: use width = {self.width + 1}, "
                   "or bidirectional = false")


# The setting's published name is also that of a method which pydantic has deprecated and nobody here calls.
warnings.filterwarnings("ignore", 'Field name "copy" in "RNNDecoderConfig" shadows')


class RNNDecoderConfig(RNNSideConfig):
    """A recurrent decoder: how it meets the source."""

    context: Literal["initial", "every_step", "input_only"] = Field("initial", description="where the decoder meets "
                     "the vector: its start state (Sutskever 2014), each step too (Cho 2014), or as its only input")
    attention: Literal["none", "before", "after"] = Field("none", description="before the cell (Bahdanau 2015), after "
                                                          "it (Luong 2015), or none: the fixed vector alone")
    score: ScoreName = Field("additive", description="how query and key are compared; only with attention")
    input_feeding: bool = Field(False, description="each step is told what the last attention made (Luong 2015, "
                                                   "section 3.3); only with attention = \"after\"")
    window: Literal["global", "local_m", "local_p"] = Field("global", description="look at all, or near the same "
                                                            "(local_m) or a predicted place (local_p) (Luong 2015)")
    window_radius: int = Field(10, ge=1, description="source tokens on each side of a local window's centre")
    coverage: bool = Field(False, description="attention is told where it has looked before (See et al. 2017, eq. 11)")
    copy: bool = Field(False, description="a token may be copied from the source (See et al. 2017, eq. 9)")  # type: ignore[assignment]

    def reasons(self) -> Iterator[str]:
        yield from super().reasons()
        if self.attention == "none":
            for setting in self.changed("score", "input_feeding", "window", "coverage", "copy"):
                yield (f'{setting} means nothing with attention = "none": set attention = "before" or "after", or '
                       f"leave {setting.split()[0]} out")
        elif self.context != "initial":
            yield (f'context = "{self.context}" feeds the fixed vector at each step, which attention = '
                   f'"{self.attention}" replaces: use context = "initial" or attention = "none"')
        if self.attention == "before" and self.input_feeding:
            yield ('input_feeding = true means nothing with attention = "before", where the context enters the cell '
                   'anyway: use attention = "after", or leave input_feeding out')
        if self.window == "global":
            for setting in self.changed("window_radius"):
                yield (f'{setting} means nothing with window = "global": use window = "local_m" or "local_p", or leave '
                       "window_radius out")


class ConvSideConfig(SideConfig):
    """A convolutional encoder or decoder (Gehring et al. 2017)."""

    kind: Literal["conv"]
    kernel: int = Field(3, ge=1, description="positions that one convolution sees")
    stochastic_depth: float = Field(0.0, ge=0, lt=1, description="share of the last layer's residual branches that are "
                                    "left out in training, less in those before (Huang et al. 2016)")
    max_positions: int = Field(1025, ge=1, description="longest sequence, </s> included, that learned positions tell")

    @property
    def longest(self) -> int:
        return self.max_positions


class TransformerSideConfig(SideConfig):
    """A Transformer's encoder or decoder."""

    kind: Literal["transformer"]
    heads: int = Field(4, ge=1, description="attention heads; they divide the width between them")
    kv_heads: int | None = Field(None, ge=1, description="heads of keys and values, each shared by heads / kv_heads "
                                                         "queries (Ainslie et al. 2023); default: as many as heads")
    feedforward: int = Field(1024, ge=1, description="width of the hidden layer between attentions")
    norm: Literal["post", "pre"] = Field("pre", description="norm after each residual (2017), or before")
    norm_kind: Literal["layer", "rms"] = Field("layer", description="layer norm, or root mean square (Zhang 2019)")
    positions: PositionsName = Field("sinusoidal", description="how order is told; relative = T5's buckets")
    max_positions: int = Field(1025, ge=1, description="longest sequence, </s> included, that learned positions tell")
    activation: Literal["relu", "gelu", "swiglu"] = Field("relu", description="relu | gelu | swiglu (Shazeer 2020)")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="share of attention weights dropped in training")
    feedforward_dropout: float = Field(0.0, ge=0, lt=1, description="share of hidden feed-forward values dropped")
    stochastic_depth: float = Field(0.0, ge=0, lt=1, description="share of the last layer's residual branches that are "
                                    "left out in training, less in those before (Huang et al. 2016)")

    @property
    def longest(self) -> int | None:
        return self.max_positions if self.positions == "learned" else None

    def reasons(self) -> Iterator[str]:
        yield from super().reasons()
        if self.width % self.heads:
            yield (f"heads = {self.heads} do not divide width = {self.width}: "
                   f"heads = {divisor(self.width, self.heads)} would")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            yield (f"kv_heads = {self.kv_heads} do not divide heads = {self.heads}: "
                   f"kv_heads = {divisor(self.heads, self.kv_heads)} would")
        if self.positions == "sinusoidal" and self.width % 2:
            yield (f'positions = "sinusoidal" needs an even width, and width = {self.width}: '
                   f"use width = {self.width + 1}")
        if self.positions == "rotary" and self.width % (2 * self.heads):
            even = 2 * self.heads * (self.width // (2 * self.heads) + 1)
            yield (f'positions = "rotary" turns pairs of values in each head, and width = {self.width} / heads = '
                   f"{self.heads} is no even number: use width = {even}")
        if self.positions != "learned":
            for setting in self.changed("max_positions"):
                yield (f'{setting} means nothing with positions = "{self.positions}": use positions = "learned", or '
                       "leave max_positions out")


def divisor(number: int, most: int) -> int:
    """The greatest divisor of a number that is at most so great."""
    return next(candidate for candidate in range(min(number, most), 0, -1) if number % candidate == 0)


class RNNConfig(RNNEncoderConfig, RNNDecoderConfig, WholeConfig):
    """The RNN encoder-decoder, with its fixed vector or with attention."""

    @property
    def encoder(self) -> RNNEncoderConfig:
        """The settings of the encoder."""
        return self

    @property
    def decoder(self) -> RNNDecoderConfig:
        """The settings of the decoder."""
        return self

    def reasons(self) -> Iterator[str]:
        yield from super().reasons()
        yield from self.unread(self)


class ConvConfig(ConvSideConfig, WholeConfig):
    """The convolutional encoder-decoder of Gehring et al. (2017)."""

    @property
    def encoder(self) -> ConvSideConfig:
        """The settings of the encoder."""
        return self

    @property
    def decoder(self) -> ConvSideConfig:
        """The settings of the decoder."""
        return self


class TransformerConfig(TransformerSideConfig, WholeConfig):
    """The Transformer of Vaswani et al. (2017)."""

    encoder_layers: int | None = Field(None, ge=1, description="layers of the encoder; default: layers")
    decoder_layers: int | None = Field(None, ge=1, description="layers of the decoder; default: layers")

    @property
    def encoder(self) -> TransformerSideConfig:
        """The settings of the encoder."""
        return self.model_copy(update={"layers": self.encoder_layers or self.layers})

    @property
    def decoder(self) -> TransformerSideConfig:
        """The settings of the decoder."""
        return self.model_copy(update={"layers": self.decoder_layers or self.layers})

    def reasons(self) -> Iterator[str]:
        yield from super().reasons()
        if self.encoder_layers and self.decoder_layers:
            for setting in self.changed("layers"):
                yield f"{setting} means nothing where encoder_layers and decoder_layers are both given: leave one out"


EncoderConfig = Annotated[RNNEncoderConfig | ConvSideConfig | TransformerSideConfig, Field(discriminator="kind")]
DecoderConfig = Annotated[RNNDecoderConfig | ConvSideConfig | TransformerSideConfig, Field(discriminator="kind")]


class MixedConfig(WholeConfig):
    """An encoder and a decoder that may be of different families and widths: [model.encoder] and [model.decoder]."""

    encoder: EncoderConfig
    decoder: DecoderConfig

    def reasons(self) -> Iterator[str]:
        """Why these settings cannot work together; nothing if they can."""
        encoder, decoder = self.encoder, self.decoder
        yield from (f"encoder: {reason}" for reason in encoder.reasons())
        yield from (f"decoder: {reason}" for reason in decoder.reasons())
        yield from self.unread(decoder)
        widths = f"encoder.width = {encoder.width}, decoder.width = {decoder.width}"
        if self.tie == "all" and encoder.width != decoder.width:
            yield f'tie = "all" needs one width, and {widths}: use tie = "decoder", or equal widths'
        if not isinstance(decoder, RNNDecoderConfig):
            for setting in encoder.changed("summary") if isinstance(encoder, RNNEncoderConfig) else ():
                yield (f'encoder.{setting} means nothing with decoder.kind = "{decoder.kind}", which looks at all '
                       'states: leave summary out, or use decoder.kind = "rnn"')
        elif decoder.attention != "none" and decoder.score.endswith("dot") and encoder.width != decoder.width:
            yield (f'decoder.score = "{decoder.score}" compares vectors of one width, and {widths}: use score = '
                   '"general", "concat" or "additive", or equal widths')


def kind_of(settings: Any) -> str | None:
    """Which of the classes the settings of `[model]` are for: a kind, or "mixed"."""
    if not isinstance(settings, Mapping):
        return getattr(settings, "kind", "mixed" if isinstance(settings, MixedConfig) else None)
    return "mixed" if {"encoder", "decoder"} & settings.keys() else settings.get("kind")


AnyModelConfig = Annotated[
    Annotated[RNNConfig, Tag("rnn")] | Annotated[ConvConfig, Tag("conv")]
    | Annotated[TransformerConfig, Tag("transformer")] | Annotated[MixedConfig, Tag("mixed")],
    Discriminator(kind_of),
]
MODELS: dict[str, type[Section]] = {
    "rnn": RNNConfig, "conv": ConvConfig, "transformer": TransformerConfig, "mixed": MixedConfig}
ENCODERS: dict[str, type[Section]] = {
    "rnn": RNNEncoderConfig, "conv": ConvSideConfig, "transformer": TransformerSideConfig}
DECODERS: dict[str, type[Section]] = ENCODERS | {"rnn": RNNDecoderConfig}
