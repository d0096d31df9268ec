"""The settings of `[train]`, declared exactly once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from regard.config_model import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class CheckedSection(Section):
    """A section whose settings must fit each other."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if reasons := "\n".join(self.reasons()):
            raise ValueError(reasons)
        return self

    def reasons(self) -> Iterator[str]:
        """Why these settings cannot work together; nothing if they can."""
        yield from ()


class TrainConfig(CheckedSection):
    """One training: how long, how fast, how it is judged, and what is kept. docs/training.md tells when to use what."""

    start_from: Path | None = Field(None, description="begin with the weights of this run's best checkpoint, or of "
                                    "this checkpoint, instead of random ones; relative to this file")
    steps: int = Field(10000, ge=1, description="updates in all")
    minutes: float | None = Field(None, gt=0, description="stop after so many minutes, if steps last longer")
    batch_tokens: int = Field(4096, ge=1, description="padded target tokens of one update, over all devices")
    accumulate: int | Literal["auto"] = Field(1, description="pieces that one update's batch is computed in, to save "
                                              "memory or to share it among processes; auto = as many as memory needs, "
                                              "measured before the first")
    optimizer: Literal["adamw", "adam", "sgd", "adafactor"] = Field("adamw", description="adamw | adam | sgd (with "
                                                                    "momentum) | adafactor")
    learning_rate: float = Field(1e-3, gt=0, description="its highest value, reached after warm-up")
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = Field(
        "inverse_sqrt", description="what follows warm-up: inverse_sqrt | cosine, linear (down to steps) | constant")
    final_learning_rate: float = Field(0.0, ge=0, le=1, description="share of the highest learning rate that is left "
                                       "at the last update; only of cosine and linear")
    warmup: int = Field(1000, ge=0, description="updates over which the learning rate rises from 0")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="running averages of adamw and adam")
    momentum: float = Field(0.9, ge=0, lt=1, description="share of its last step that sgd takes again")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, on matrices only")
    clip: float = Field(1.0, ge=0, description="highest norm of an update's gradient; 0 = no clipping")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the running average of the weights, which is validated "
                       "and translates, such as 0.999; 0 = the weights themselves")
    freeze: tuple[str, ...] = Field((), description="beginnings of names of weights that do not learn, such as "
                                    '["encoder", "decoder.embedding"]')
    max_skipped: int = Field(5, ge=1, description="updates in a row whose loss or gradient is no number, none of them "
                             "made, that end a training")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of each target spread over the vocabulary")
    coverage_loss: float = Field(0.0, ge=0, description="weight of attention to places seen before (See et al. 2017, "
                                 "eq. 12; they used 1); only with [model] coverage = true")
    guided_alignment: float = Field(0.0, ge=0, description="λ: weight of how far attention is from the word links of "
                                    "the corpora's alignment (Chen et al. 2016; Garg et al. 2019 used 0.05); 0 = none")
    guided_layer: int | None = Field(None, ge=1, description="decoder layer, from 1, whose attention (its first head) "
                                     "follows the links; default: the last but one; not of an RNN, which has one")
    r_drop: float = Field(0.0, ge=0, description="α: weight of how much two passes with other dropout differ (Liang "
                          "et al. 2021, eq. 4; they used 5); 0 = one pass")
    validate_every: int = Field(500, ge=1, description="updates between validations, each with a checkpoint")
    metric: Literal["bleu", "token_error_rate", "loss"] = Field("bleu", description="what chooses the best checkpoint: "
                                                                "of greedy output, or the validation loss")
    patience: int = Field(0, ge=0, description="stop after so many validations without a better one; 0 = never")
    average: int = Field(1, ge=1, description="last checkpoints kept, and averaged into one at the end; 1 = no average")
    log_every: int = Field(50, ge=1, description="updates between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="write tensorboard/ too (extra: tensorboard)")
    threads: int = Field(0, ge=0, description="processor threads; 0 = as torch finds best")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of matrix products in training; "
                                                              "the rest stays float32. auto = the fastest there are")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = a GPU where there is one")
    deterministic: bool = Field(False, description="sum the gradients of pieces in one order, so that with the same "
                                "accumulate and threads any number of processes gives the same bits; slower")
    shard: bool = Field(False, description="with torchrun: each process holds its part of the weights and of the "
                        "optimizer's state (FSDP2), for models that one device does not train; slower")
    seed: int = Field(1, ge=0, description="of weights, order and dropout")

    @field_validator("batch_tokens", mode="before")
    @classmethod
    def _not_of_the_machine(cls, value: Any) -> Any:
        if value == "auto":
            raise PydanticCustomError("batch_tokens", "the size of a batch is part of what is learned, so it is a "
                                      "number; in how many pieces memory holds it is measured with accumulate = "
                                      '"auto"')
        return value

    @field_validator("accumulate", mode="plain")
    @classmethod
    def _count_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            raise PydanticCustomError("accumulate", 'input should be a whole number from 1, or "auto"')
        return value

    def reasons(self) -> Iterator[str]:
        owners = {"betas": ("adamw", "adam"), "momentum": ("sgd",), "final_learning_rate": ("cosine", "linear")}
        for setting in self.changed(*owners):
            name = setting.split()[0]
            choice = "schedule" if name == "final_learning_rate" else "optimizer"
            if getattr(self, choice) not in owners[name]:
                known = " or ".join(f'"{owner}"' for owner in owners[name])
                yield (f'{setting} means nothing with {choice} = "{getattr(self, choice)}": use {choice} = {known}, or '
                       f"leave {name} out")
        if self.guided_layer is not None and not self.guided_alignment:
            yield (f"guided_layer = {self.guided_layer} means nothing with guided_alignment = 0: set "
                   "guided_alignment = 0.05, or leave guided_layer out")
        if self.shard and self.deterministic:
            yield ("shard = true and deterministic = true: the parts of a gradient are summed in the order that is "
                   "fastest: leave one of them out")
        if self.shard and self.optimizer == "adafactor":
            yield ('shard = true and optimizer = "adafactor": its means of rows and columns need whole matrices: use '
                   'optimizer = "adamw", or leave shard out')
        if self.shard and self.accumulate == "auto":
            yield ('shard = true and accumulate = "auto": processes that gather weights together cannot each try what '
                   "memory holds: give accumulate a number")
        if self.deterministic and self.accumulate == "auto":
            yield ('deterministic = true needs pieces that do not depend on the machine, and accumulate = "auto" does: '
                   "give accumulate a number, such as that of the processes")
